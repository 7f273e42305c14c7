"""Which experts lose their slots."""
