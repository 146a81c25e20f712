"""`fused_losses.primitives.distances.op` by its first name."""

from fused_losses.primitives.distances.op import distance_matrix as distance_matrix
