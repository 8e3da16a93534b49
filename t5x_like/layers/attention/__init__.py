"""Attention: the mathematics softmax(scale q k) v under a mask, with a position bias.

choice.py is the one entrance and decides which path runs: kernels.py (flash attention of TPUs and GPUs), blockwise.py
(fast on a CPU) or materialised.py (right everywhere). masks.py and biases.py say which keys a query sees and what is
added to its logits; kv_cache.py keeps keys and values for decoding. NOT here: projections and rotary positions
(block.py, positions.py).
"""
