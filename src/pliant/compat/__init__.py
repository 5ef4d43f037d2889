"""The only place where pliant patches another package, subclasses its internals, or uses its private names.

Each of these has a test against the package versions in use.
"""
