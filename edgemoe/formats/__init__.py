"""What the bytes of a weight mean: the parts of a record, and reading them back."""
