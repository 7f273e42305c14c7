"""Files of a checkpoint: tensors, configuration, tokenizer, and state that edgemoe keeps about it between runs."""
