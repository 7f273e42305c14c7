"""The terminal: arguments, rendering and files. It knows nothing of how a token is made."""
