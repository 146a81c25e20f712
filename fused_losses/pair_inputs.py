"""`fused_losses.primitives.pairs.inputs` by its first name."""

from fused_losses.primitives.pairs.inputs import BEST as BEST
from fused_losses.primitives.pairs.inputs import COUNT as COUNT
from fused_losses.primitives.pairs.inputs import NEGATIVE as NEGATIVE
from fused_losses.primitives.pairs.inputs import POSITIVE as POSITIVE
from fused_losses.primitives.pairs.inputs import REDUCTIONS as REDUCTIONS
from fused_losses.primitives.pairs.inputs import SCORES as SCORES
from fused_losses.primitives.pairs.inputs import TOTAL as TOTAL
from fused_losses.primitives.pairs.inputs import VALUE as VALUE
from fused_losses.primitives.pairs.inputs import PairInputs as PairInputs
from fused_losses.primitives.pairs.inputs import PairNeeds as PairNeeds
from fused_losses.primitives.pairs.inputs import Rule as Rule
