"""llama.cpp as a peer: its library, and its converter."""
