"""What a run is, composed of the configs and parts of all floors below."""
