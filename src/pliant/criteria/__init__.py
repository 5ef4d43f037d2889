"""Importance: which units and blocks of a model matter least."""

from pliant.criteria.l1 import by_falling, l1_norms, l1_orders

__all__ = ["by_falling", "l1_norms", "l1_orders"]
