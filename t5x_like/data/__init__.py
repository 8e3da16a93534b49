"""Floor 3: from text to a batch that is a pure function of the step. Numpy only."""
