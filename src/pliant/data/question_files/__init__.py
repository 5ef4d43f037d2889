"""Read questions from files, in the forms that are in use."""
