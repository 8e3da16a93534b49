"""Reading: from the token cache to a batch that is a pure function of the step."""
