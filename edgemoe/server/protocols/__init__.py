"""HTTP protocols: from a JSON body to what the engine is asked, and from its chunks to events. Knows no sockets."""
