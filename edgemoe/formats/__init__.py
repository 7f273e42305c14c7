"""Weight formats: the parts that a weight matrix has in a record, and how to read them back."""
