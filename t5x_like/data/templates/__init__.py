"""Conversations to text: messages, chat templates in a sandbox, and which of the text the assistant wrote."""
