"""How long a step takes, and why: from the text of the compiled program."""
