"""Which experts to load ahead. This package knows sets of experts; not how models compute or how bytes move."""
