"""UNPG and the batch's shared negatives by their first name."""

from fused_losses.functions.unpg import UNPG as UNPG
from fused_losses.functions.unpg import unpg_margin_softmax as unpg_margin_softmax
from fused_losses.primitives.shared_negatives.op import (
    add_shared as add_shared,
)
from fused_losses.primitives.shared_negatives.op import (
    shared_negatives as shared_negatives,
)
