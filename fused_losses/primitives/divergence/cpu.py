"""What the compiled kernels of divergences need, told by the plans that they allocate by."""

from __future__ import annotations

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.divergence.inputs import DivergenceInputs, DivergenceNeeds


def workspace(p: DivergenceInputs, needs: DivergenceNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), item, wide = p.x.shape, p.weight.dtype.itemsize, p.dtype.itemsize
    dense = p.teacher_weight is None
    gradient, of_teacher = needs is not None, needs is not None and needs.of_teacher
    teacher_d = 0 if dense else p.teacher.shape[1]
    planned = extension().divergence_workspace(
        n, d, teacher_d, item, p.precision, gradient, of_teacher
    )
    # sorted labels, gradients of rows and vectors of classes in the type that accumulates
    vectors = n * (16 + 8 * wide) + 4 * p.weight.shape[0] * wide
    narrowed = dense and needs is not None and needs.teacher and p.teacher.dtype != p.dtype
    return planned + vectors + (p.teacher.numel() * wide if narrowed else 0)
