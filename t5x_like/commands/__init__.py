"""Floor 10: one file a command; arguments in, library calls, exit status out."""
