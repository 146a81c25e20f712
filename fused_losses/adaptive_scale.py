"""`fused_losses.functions.adaptive_scale` by its first name."""

from fused_losses.functions.adaptive_scale import (
    AdaptiveScale as AdaptiveScale,
)
from fused_losses.functions.adaptive_scale import (
    adaptive_margin_softmax as adaptive_margin_softmax,
)
