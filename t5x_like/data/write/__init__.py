"""Writing: from sources of text to the token cache, in processes."""
