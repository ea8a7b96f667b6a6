"""Documents become tokens, once."""
