"""Prompts as callers give them, checked before they are tokenized."""
