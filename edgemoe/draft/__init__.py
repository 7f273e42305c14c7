"""What may follow a sequence, what drafting it costs, and when drafting stops."""
