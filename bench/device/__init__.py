"""What the CUDA path does on a card: whether it is right, and the figures that decide how it goes on."""
