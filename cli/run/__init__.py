"""`edgemoe run`: requests read from a file, answered in batches, results written and resumed."""
