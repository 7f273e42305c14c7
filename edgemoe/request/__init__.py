"""One request: sampling, stop texts, detokenizing and timings."""
