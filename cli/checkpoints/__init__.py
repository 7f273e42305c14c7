"""Commands about checkpoints: which there are, and packing them."""
