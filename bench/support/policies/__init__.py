"""Policies of eviction that edgemoe is compared with, and what replays a trace of requests through them."""
