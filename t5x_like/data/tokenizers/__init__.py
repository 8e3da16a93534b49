"""Text to token ids and back: vocabularies, the files they come from, and training one."""
