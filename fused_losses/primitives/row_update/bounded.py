"""By blocks of rows, in PyTorch."""

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.row_update.inputs import RowStep
from fused_losses.primitives.row_update.rules import in_blocks

BLOCK_BYTES = 1 << 20  # of weights in a block of rows, widened


def run(p: RowStep) -> None:
    """The call; memory of some blocks."""
    row = p.weight.shape[1] * accumulate_dtype(p.weight.dtype).itemsize
    in_blocks(p, max(1, BLOCK_BYTES // max(1, row)))
