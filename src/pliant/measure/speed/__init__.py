"""Speed of a model on this machine."""
