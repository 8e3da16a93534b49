"""One file a family: its sizes and the fields that make it what it is."""
