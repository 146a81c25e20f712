"""Losses of rows and the neighbours or atoms that they fall to; `losses.clusters`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced
from fused_losses.base.validation import check_matrix, describe
from fused_losses.functions.sparse_codes import sparse_codes, sparse_decode
from fused_losses.pairwise.topk import pairwise_topk


def attract_disperse(
    embeddings: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    bank: Tensor | None = None,  # [M, D]
    bank_probabilities: Tensor | None = None,  # [M, C]
    ids: Tensor | None = None,  # [N]
    bank_ids: Tensor | None = None,  # [M]
    *,
    k: int,
    alpha: float | Tensor,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """-sum_{j in kNN(i)} p_i q_j + alpha sum_{m != i} p_i p_m, p the softmax of the logits.

    Neighbours are by cosine among the bank's rows, their q without gradient; without a bank among
    the batch's others. Rows with equal ids are no neighbours. The second sum is that of |sum p|^2:
    O(N C). Time O(N M D + N k C), memory O(N (k C + D)).
    """
    check_matrix("logits", logits, "[N, C]")
    check_matrix("embeddings", embeddings, "[N, D]")
    if logits.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"logits: expected {embeddings.shape[0]} rows as embeddings, got {describe(logits)}"
        )
    if (bank is None) != (bank_probabilities is None):
        name = "bank" if bank is None else "bank_probabilities"
        raise ValueError(f"{name}: expected a tensor beside the other, got None")
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    weight = validation.number("alpha", alpha, logits, positive=False)
    with no_autocast(embeddings.device):
        dtype = accumulate_dtype(logits.dtype)
        p = logits.to(dtype).softmax(dim=1)
        told = p.detach()
        if bank_probabilities is not None:
            told = check_matrix("bank_probabilities", bank_probabilities, "[M, C]").detach()
            assert bank is not None
            if tuple(told.shape) != (bank.shape[0], logits.shape[1]):
                raise ValueError(
                    f"bank_probabilities: expected ({bank.shape[0]}, {logits.shape[1]}), got "
                    f"{describe(told)}"
                )
        index = pairwise_topk(
            embeddings.detach(),
            None if bank is None else bank.detach(),
            k,
            "cosine",
            x_ids=ids,
            y_ids=ids if bank is None else bank_ids,
            skip_self=bank is None,
            backend=backend,
        )[1]
        near = torch.zeros_like(p)
        for column in index.T if told.shape[0] else ():
            near = near + torch.where(column[:, None] < 0, 0, told[column.clamp_min(0)].to(dtype))
        total = p.sum(dim=0)
        apart = (p * (total - p)).sum(dim=1)
        loss = weight.to(dtype) * apart - (p * near).sum(dim=1)
        counted = torch.ones_like(loss, dtype=torch.bool)
        return reduced(loss, counted, reduction, dtype)


class Atoms(NamedTuple):
    """A sparse autoencoder's parameters."""

    encoder: Tensor  # [F, D]
    decoder: Tensor  # [F, D]
    latent_bias: Tensor  # [F]
    pre_bias: Tensor  # [D]


def sparse_reconstruction(
    x: Tensor,  # [N, D]
    atoms: Atoms,
    dead: Tensor,  # [F] bool
    *,
    k: int,
    aux_k: int,
    aux_weight: float | Tensor,
    reduction: str = "mean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """mean_d (x - x')^2 + aux_weight mean_d (e - e')^2, and which atoms fired [F] bool.

        z = relu(top k of <x - b, w_f> + c_f),  x' = sum_f z_f v_f + b
        e = x - x' without gradient,  e' of the aux_k best dead atoms that did not fire, without b

    The N x F matrix is never stored. Time O(N F D + N k D), memory O(N (k + D) + F D).
    """
    validation.check_pair("x", x, "encoder", atoms.encoder)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    weight = validation.number("aux_weight", aux_weight, x, positive=False)
    with no_autocast(x.device):
        dtype = accumulate_dtype(torch.promote_types(x.dtype, atoms.encoder.dtype))
        x, *parts = (t.to(dtype) for t in (x, *atoms))
        encoder, decoder, latent_bias, pre_bias = parts
        moved = x - pre_bias
        values, index = sparse_codes(moved, encoder, k, bias=latent_bias, backend=backend)
        values = values.relu()
        error = x - sparse_decode(values, index, decoder, bias=pre_bias)
        loss = error.square().mean(dim=1)
        live = (values.detach() > 0).flatten().int()
        fired = torch.zeros_like(dead, dtype=torch.int32)
        fired = fired.index_add(0, index.clamp_min(0).flatten(), live) > 0
        if aux_k:
            quiet = dead & ~fired
            again, which = sparse_codes(
                moved, encoder, aux_k, bias=latent_bias, among=quiet, backend=backend
            )
            rest = error.detach() - sparse_decode(again.relu(), which, decoder)
            rest = torch.where(quiet.any(), rest, 0).square().mean(dim=1)
            loss = loss + weight.to(dtype) * rest
        counted = torch.ones_like(loss, dtype=torch.bool)
        return reduced(loss, counted, reduction, dtype), fired
