"""What matters inside a model."""

from pliant.importance.magnitude import l1_norms, l1_orders

__all__ = ["l1_norms", "l1_orders"]
