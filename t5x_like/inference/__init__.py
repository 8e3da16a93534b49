"""Floor 5: sampling and decoding with a KV cache."""
