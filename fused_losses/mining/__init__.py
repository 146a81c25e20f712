"""Mining: the triplets and pairs that a loss is worth taking over."""

from fused_losses.mining.lists import Pairs, Triplets
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets

__all__ = ["Pairs", "Triplets", "mine_pairs", "mine_triplets"]
