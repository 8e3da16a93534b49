"""Floor 2: everything that is written to disk or gs:// and read back."""
