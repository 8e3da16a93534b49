"""Models of other programs as ours and back: tables of names and layouts, and the files that they stand in."""
