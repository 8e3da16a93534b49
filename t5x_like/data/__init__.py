"""Floor 3: from text to a batch that is a pure function of the step. Numpy only.

`write/` makes the token cache, `read/` makes batches of it, `tokenizers/` serves both. Here: the config, and the
cache itself (`cache.py` names what belongs to a config, `token_shards.py` is the format of one set).
"""
