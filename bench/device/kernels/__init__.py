"""The package's own kernels on a card: their values against the plain form, and their speed."""
