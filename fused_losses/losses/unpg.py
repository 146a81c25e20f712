"""`fused_losses.functions.unpg` by its first name."""

from fused_losses.functions.unpg import UNPG, unpg_margin_softmax

__all__ = ["UNPG", "unpg_margin_softmax"]
