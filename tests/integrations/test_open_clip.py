"""Losses of open_clip on our ops: values and gradients are its own."""

from __future__ import annotations

from typing import Any

import hard_data
import pytest
import torch
from peer_values import check_as_the_peer
from torch import Tensor

from fused_losses import integrations

loss = pytest.importorskip(
    "open_clip.loss", reason="the peer is not installed", exc_type=ImportError
)

PEER = "open_clip"
N, D = 17, 8
KINDS = ("plain", "near duplicates", "unit clusters", "large")

TEACHER = ("dist_image_features", "dist_text_features")

# the class, and what it is called with beside the features
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("ClipLoss", {}),
    "clip, biased": ("ClipLoss", dict(logit_bias=-3.0)),
    "clip, dict": ("ClipLoss", dict(output_dict=True)),
    "captions": ("CoCaLoss", {}),
    "captions, dict": ("CoCaLoss", dict(output_dict=True)),
    "distilled": ("DistillClipLoss", dict(dist_logit_scale=8.0)),
    "distilled, dict": ("DistillClipLoss", dict(dist_logit_scale=8.0, output_dict=True)),
    "siglip": ("SigLipLoss", dict(logit_bias=-6.0)),
    "siglip, dict": ("SigLipLoss", dict(logit_bias=-6.0, output_dict=True)),
}


def features(kind: str) -> tuple[Tensor, Tensor]:
    """Both sides in float64, of float32's values; the second a noisy first."""
    generator = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, N, D, generator=generator, dtype=torch.float64) / D**0.5
    x, y = (hard_data.KINDS[kind](rows, generator) for rows in (x, x + 0.5 * noise))
    return x.float().double(), y.float().double()


def outcome(name: str, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, then the gradients of both sides, of the scale and of the bias."""
    cls, options = CALLS[name]
    leaves = [rows.to(dtype).requires_grad_() for rows in features(kind)]
    given = {"logit_scale": 4.0, **options}
    for key in ("logit_scale", "logit_bias"):
        if key in given:
            given[key] = torch.tensor(given[key], dtype=dtype, requires_grad=True)
            leaves.append(given[key])
    made = {}
    if cls == "CoCaLoss":
        made = dict(caption_loss_weight=2.0, clip_loss_weight=0.5)
        words = torch.arange(N * 4).view(N, 4) % 5  # word 0 is padding
        logits = torch.linspace(-1, 1, N * 4 * 5, dtype=dtype).sin().view(N, 4, 5)
        leaves.append(logits.requires_grad_())
        given |= dict(logits=logits, labels=words)
    if cls == "DistillClipLoss":
        given |= dict(zip(TEACHER, (rows.to(dtype) for rows in features("plain")), strict=True))
    value = getattr(loss, cls)(**made)(*leaves[:2], **given)
    if options.get("output_dict"):
        names = list(value)
        assert names[0] == "contrastive_loss" and len(names) == 1 + (
            cls not in ("ClipLoss", "SigLipLoss")
        )
        value = tuple(value.values())
    value = sum(value) if isinstance(value, tuple) else value
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_peers(name: str, kind: str, dtype: torch.dtype) -> None:
    each = lambda dtype: outcome(name, kind, dtype)
    check_as_the_peer(PEER, CALLS[name][0], each, dtype, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_another_ranks_texts_are_all_negatives(dtype: torch.dtype) -> None:
    def each(dtype: torch.dtype) -> list[Tensor]:
        x, y = (rows.to(dtype).requires_grad_() for rows in features("plain"))
        value = loss.SigLipLoss()._loss(x, y, 4.0, -6.0, negative_only=True)
        return [value.detach(), *torch.autograd.grad(value, (x, y))]

    check_as_the_peer(PEER, "SigLipLoss", each, dtype, D)


def test_every_row_has_its_calls() -> None:
    assert {cls for cls, _ in CALLS.values()} == {row.name for row in integrations.table(PEER).rows}
    # a class of the loss's file that is neither here nor in a base would be new
    public = {name for name in vars(loss) if name.endswith("Loss")}
    assert public == {row.name for row in integrations.table(PEER).rows}


def test_a_learning_teacher_is_the_peers_own() -> None:
    x, y = features("plain")
    taught = [rows.clone().requires_grad_() for rows in features("near duplicates")]
    distilled = loss.DistillClipLoss()
    want = distilled(x, y, 4.0, *taught, 8.0)
    with integrations.accelerate(PEER) as acceleration:
        assert distilled(x, y, 4.0, *taught, 8.0) == want
        (ran,) = acceleration.report()
    assert ran == ("DistillClipLoss", 0, {"a teacher that learns": 1})


def test_what_is_not_covered_is_the_peers_own() -> None:
    x, y = features("plain")
    clip = loss.ClipLoss()
    want = clip(x, y, -4.0)
    with integrations.accelerate(PEER) as acceleration:
        assert clip(x, y, -4.0).equal(want)
        (ran,) = acceleration.report()
    assert ran == ("ClipLoss", 0, {"logit_scale=-4.0": 1})
    with (
        integrations.accelerate(PEER, strict=True),
        pytest.raises(RuntimeError, match="logit_scale=-4"),
    ):
        clip(x, y, -4.0)
