"""The only place where pliant changes another package, and why. Every change has a test against the versions it is for."""
