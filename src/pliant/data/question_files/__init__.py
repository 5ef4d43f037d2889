"""Questions from files in common formats."""
