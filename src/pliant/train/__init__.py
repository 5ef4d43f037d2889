"""Training that follows a cut."""
