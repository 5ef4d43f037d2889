"""Steps on values: zero, round or pack weights. No shape changes."""
