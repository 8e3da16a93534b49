"""What a program's memory is made of: from the text of the compiled program."""
