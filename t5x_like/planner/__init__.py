"""Floor 8: what the TPU compiler says of a program, on a machine without a TPU."""
