"""Passes over sequences: KV caches, tree masks, and the runners of passes."""
