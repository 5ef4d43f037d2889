"""The published systems, one file each. Baselines and our own searches are in ``pliant.prune``."""
