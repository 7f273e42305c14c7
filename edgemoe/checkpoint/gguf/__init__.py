"""GGUF files: their headers, and what they stand for in transformers."""
