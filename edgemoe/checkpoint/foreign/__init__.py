"""What others wrote is checked here before it is believed: files, JSON, configurations, templates, tokenizers."""
