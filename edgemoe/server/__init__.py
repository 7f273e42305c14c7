"""HTTP around an engine."""
