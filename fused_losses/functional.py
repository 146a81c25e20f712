"""The losses as functions.

Every function takes `backend=` (None: `use_backend`, FUSED_LOSSES_BACKEND, else auto) and
`precision=`: "fp32" (default: float32 accuracy), "tf32", "mixed" (exact loss, bf16 products in
the gradients) or "bf16" (bf16 products, float32 sums). What a device cannot do is refused.
"""

from fused_losses.linear import linear_cross_entropy
from fused_losses.softmax import MarginSoftmaxStats, margin_softmax

__all__ = ["MarginSoftmaxStats", "linear_cross_entropy", "margin_softmax"]
