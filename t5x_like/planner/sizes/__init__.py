"""Memory and compute from sizes alone, before anything is compiled."""
