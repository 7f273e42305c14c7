"""Files of a checkpoint: tensors, configuration, tokenizer, and what is kept about it between runs."""
