"""Peers' losses over two ranks on our ops: each rank's value and gradients are the peer's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import copied_peers as copied
import processes
import pytest
import torch
from torch import Tensor, nn

from fused_losses import integrations

pytestmark = [pytest.mark.processes]

N, D, C = 6, 8, 23  # rows a rank; shards of 12 and 11 classes


def drawn(rank: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    return (torch.randn(*shape, generator=generator).double() / D**0.5).requires_grad_()


Outcome = Callable[[], list[Tensor]]


def given(value: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def pairs_of(rank: int, build: Callable[..., Any], **further: Any) -> Outcome:
    """A loss of open_clip's, and what it is called with beside features and scale."""

    def outcome() -> list[Tensor]:
        image, text = drawn(rank, N, D), drawn(rank, N, D, seed=1)
        scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        loss = build(rank=rank, world_size=2)
        found = loss(image, text, logit_scale=scale, **further)
        value = sum(found) if isinstance(found, tuple) else found
        return given(value, image, text, scale)

    return outcome


def clip(rank: int) -> Iterator[tuple[str, Any, Outcome]]:
    loss = pytest.importorskip("open_clip.loss", reason="the peer", exc_type=ImportError)
    teacher = dict(
        dist_image_features=drawn(rank, N, 5, seed=2).detach(),
        dist_text_features=drawn(rank, N, 5, seed=3).detach(),
        dist_logit_scale=8.0,
    )

    for local, grad in itertools.product((False, True), repeat=2):
        options = dict(local_loss=local, gather_with_grad=grad)
        told = f"local_loss={local}, gather_with_grad={grad}"
        yield f"clip, {told}", "open_clip", pairs_of(rank, partial(loss.ClipLoss, **options))
    for way in ("bidir", "shift", "reduce", "gather"):
        made = partial(loss.SigLipLoss, dist_impl=way)
        yield f"siglip, {way}", "open_clip", pairs_of(rank, made, logit_bias=-6.0)
    for local in (False, True):
        made = partial(loss.DistillClipLoss, local_loss=local, gather_with_grad=True)
        yield f"distilled, local_loss={local}", "open_clip", pairs_of(rank, made, **teacher)


def copies(rank: int) -> Iterator[tuple[str, Any, Outcome]]:
    def head(margin: Any, rate: float) -> Outcome:
        def outcome() -> list[Tensor]:
            module = copied.PartialFC_V2(margin, D, C, rate).double()
            x = drawn(rank, N, D)
            torch.manual_seed(rank)
            labels = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(rank))
            return given(module(x, labels), x, module.weight)

        return outcome

    def contrastive() -> list[Tensor]:
        x, y = drawn(rank, N, D), drawn(rank, 2 * N, D, seed=1)
        return given(copied.DistributedContrastiveLoss(1)(x, y), x, y)

    for name, margin, rate in (
        ("head", copied.CombinedMarginLoss(16.0, 1.0, 0.5, 0.0), 1.0),
        ("head, filtered", copied.CombinedMarginLoss(8.0, 1.0, 0.0, 0.3, 0.2), 1.0),
        ("head, sampled", copied.CosFace(16.0), 0.6),
    ):
        yield name, copied.PartialFC_V2, head(margin, rate)
    yield "GradCache", copied.DistributedContrastiveLoss, contrastive


EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKING, GIST = "MultipleNegativesRankingLoss", "GISTEmbedLoss"
# class, options, columns
GATHERED: dict[str, tuple[str, dict[str, Any], int]] = {
    "ranking": (RANKING, {}, 2),
    "ranking, every direction": (RANKING, dict(directions=EVERY), 4),
    "symmetric": ("MultipleNegativesSymmetricRankingLoss", {}, 3),
    "cached": (f"Cached{RANKING}", dict(directions=EVERY, mini_batch_size=4), 3),
    "cached, symmetric": (
        "CachedMultipleNegativesSymmetricRankingLoss",
        dict(mini_batch_size=5),
        2,
    ),
    "guided": (GIST, {}, 2),
    "guided, relative": (GIST, dict(margin_strategy="relative", margin=0.1), 3),
    "guided, of anchors alone": (GIST, dict(contrast_positives=False), 3),
    "cached, guided": (f"Cached{GIST}", dict(mini_batch_size=4), 3),
}


class EncoderGiven(nn.Module):
    """Stands for an encoder whose rows are in the features."""

    max_seq_length = 8

    def __init__(self, name: str) -> None:
        super().__init__()
        tokenizers = pytest.importorskip("tokenizers")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        fast = pytest.importorskip("transformers").PreTrainedTokenizerFast
        self.name, self.tokenizer = name, fast(tokenizer_object=words)

    def __getitem__(self, _: int) -> None:
        """A first module."""

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}


def of_texts(rank: int, cls: str, options: dict[str, Any], columns: int, equal: bool) -> Outcome:
    """equal: of rank 1 two texts are the same, and its guide lets them meet themselves."""

    def outcome() -> list[Tensor]:
        losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
        held = [drawn(rank, N, D, seed=seed) for seed in range(columns)]
        guides = [drawn(rank, N, D, seed=10 + seed).detach() for seed in range(columns)]
        if equal and rank:
            guides[1] = guides[0]
        models = dict(guide=EncoderGiven("guide")) if GIST in cls else {}
        loss = getattr(losses, cls)(
            EncoderGiven("rows"), gather_across_devices=True, **models, **options
        )
        if not cls.startswith("Cached"):
            if GIST in cls:
                told = zip(held, guides, strict=True)
                return given(loss([dict(rows=x, guide=g) for x, g in told], None), *held)
            return given(loss.compute_loss_from_embeddings(held, None), *held)
        size = loss.mini_batch_size
        parts = [[p.detach().requires_grad_() for p in rows.split(size)] for rows in held]
        further = [[list(rows.split(size)) for rows in guides]] if GIST in cls else []
        value = loss.calculate_loss(parts, *further, with_backward=True)
        return [value, *(torch.cat([part.grad for part in column]) for column in parts)]

    return outcome


def texts(rank: int) -> Iterator[tuple[str, Any, Outcome]]:
    for name, (cls, options, columns) in GATHERED.items():
        yield name, "sentence_transformers", of_texts(rank, cls, options, columns, False)


def refused_on_one_rank(rank: int) -> list[Any]:
    outcome = of_texts(rank, GIST, {}, 2, equal=True)
    want = outcome()
    with integrations.accelerate("sentence_transformers") as acceleration:
        got = outcome()
        (ran,) = acceleration.report()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    return [ran.accelerated, list(ran.left)]


def compare(rank: int, cases: Callable[[int], Iterator[tuple[str, Any, Outcome]]]) -> list[str]:
    told = []
    for name, peer, outcome in cases(rank):
        want = outcome()
        with integrations.accelerate(peer, strict=True) as acceleration:
            got = outcome()
            (ran,) = acceleration.report()
        assert ran.accelerated and not ran.left, name
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
        told.append(name)
    return told


def test_copied_peers_on_two_ranks() -> None:
    first, second = processes.run(2, compare, copies)
    assert first == second and len(first) == 4


@pytest.mark.slow
def test_sentence_transformers_on_two_ranks() -> None:
    pytest.importorskip("sentence_transformers", reason="the peer")
    first, second = processes.run(2, compare, texts)
    assert first == second == list(GATHERED)


@pytest.mark.slow
def test_what_one_rank_leaves_to_the_peer_every_rank_does() -> None:
    pytest.importorskip("sentence_transformers", reason="the peer")
    own = ["a row that its guide lets meet itself"]
    other = ["what another rank leaves to the peer"]
    assert processes.run(2, refused_on_one_rank) == [[0, other], [0, own]]


def test_open_clip_on_two_ranks() -> None:
    pytest.importorskip("open_clip.loss", reason="the peer", exc_type=ImportError)
    first, second = processes.run(2, compare, clip)
    assert first == second and len(first) == 10
