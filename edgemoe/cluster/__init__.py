"""Engines on other nodes of a Ray cluster, and how requests are divided among them."""
