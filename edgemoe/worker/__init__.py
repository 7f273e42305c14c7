"""The thread of an engine, and what it runs."""
