"""`fused_losses.primitives.pairs.op` by its first name."""

from fused_losses.primitives.pairs.op import PairStatistics as PairStatistics
from fused_losses.primitives.pairs.op import pair_attention as pair_attention
from fused_losses.primitives.pairs.op import pair_statistics as pair_statistics
