"""The one scorer: from hidden states and an LM head to numbers per token, without full float32 logits.

head.py says what a head is, token_scores.py and token_divergence.py what is computed, products.py holds the formulas
that both share, and head_layout.py how tokens and the head lie on the mesh.
"""
