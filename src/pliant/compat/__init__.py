"""The only place where pliant changes another package, takes the place of its classes, or uses a private name of it.

Every such thing has a test that the versions in use still bear it.
"""
