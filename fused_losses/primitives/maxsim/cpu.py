"""What the compiled kernels of MaxSim need, told by the plan that they allocate by."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds


def workspace_bytes(
    query_tokens: int,
    document_tokens: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    document_gradient: bool = True,
) -> int:
    """Peak memory beyond inputs and gradients, besides the index that the forward keeps."""
    sizes = query_tokens, document_tokens, d, dtype.itemsize
    return extension().maxsim_workspace(*sizes, precision, document_gradient)


def workspace(p: MaxsimInputs, needs: MaxsimNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (tokens, d), found = p.queries.shape, p.documents.shape[0]
    gradient = needs is not None and needs.documents
    return workspace_bytes(tokens, found, d, p.queries.dtype, p.precision, gradient)
