"""What matters inside a model."""

from pliant.importance.magnitude import by_falling, l1_norms, l1_orders

__all__ = ["by_falling", "l1_norms", "l1_orders"]
