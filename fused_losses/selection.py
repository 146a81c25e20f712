"""`fused_losses.primitives.topk` by its first name."""

from fused_losses.primitives.topk.inputs import QuantizedRows as QuantizedRows
from fused_losses.primitives.topk.inputs import TopkInputs as TopkInputs
from fused_losses.primitives.topk.listed import listed as listed
from fused_losses.primitives.topk.op import quantize_rows as quantize_rows
from fused_losses.primitives.topk.op import select as select
