"""One MoE layer: which experts a token gets, from which slots, by which kernel."""
