"""`fused_losses.functions.adaptive_scale` by its first name."""

from fused_losses.functions.adaptive_scale import AdaptiveScale, adaptive_margin_softmax

__all__ = ["AdaptiveScale", "adaptive_margin_softmax"]
