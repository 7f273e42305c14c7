"""Layers of Qwen3-30B-A3B's shape on a card: the time of a step by format and share of slots, against its floor."""
