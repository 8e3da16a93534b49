"""Instruction tuning: conversations and examples, with the loss on what the assistant says."""
