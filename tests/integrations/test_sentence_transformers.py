"""Losses of sentence-transformers on our ops: values and gradients are its own."""

from __future__ import annotations

import math
from typing import Any

import hard_data
import pytest
import torch
from peer_values import Largest, check_as_the_peer
from torch import Tensor, nn

from fused_losses import integrations

PEER = "sentence_transformers"
N, D, CLASSES = 18, 8, 6

losses = pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses", reason="the peer is not installed"
)
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
util = pytest.importorskip("sentence_transformers.util")
sparse = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
vectors = pytest.importorskip("sentence_transformers.multi_vector_encoder.losses")
scoring = pytest.importorskip("sentence_transformers.multi_vector_encoder.scoring")

KINDS = ("plain", "near duplicates", "large", "outlier")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DISTANCE = losses.BatchHardTripletLossDistanceFunction
COSINE = dict(distance_metric=DISTANCE.cosine_distance)
RANKING = "MultipleNegativesRankingLoss"
SYMMETRIC = "MultipleNegativesSymmetricRankingLoss"
TENSION = "ContrastiveTensionLossInBatchNegatives"
SEVERAL = "MultiVectorMultipleNegativesRankingLoss"
MEAN = dict(similarity_fct=scoring.mean_colbert_scores, scale=20.0)
RELATIVE = dict(margin_strategy="relative", margin=0.1, contrast_positives=False)

CALLS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ranking": (RANKING, {}, 2),
    "ranking, hard negatives": (RANKING, {}, 4),
    "ranking, products": (RANKING, dict(similarity_fct=util.dot_score, scale=1.0), 3),
    "ranking, all directions": (RANKING, dict(directions=ALL), 3),
    "ranking, per direction": (
        RANKING,
        dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
        2,
    ),
    "symmetric": (SYMMETRIC, {}, 2),
    "sparse": (f"Sparse{RANKING}", {}, 3),
    "cached": (f"Cached{RANKING}", dict(mini_batch_size=7), 4),
    "cached, all directions": (f"Cached{RANKING}", dict(directions=ALL, mini_batch_size=5), 3),
    "cached, symmetric": (f"Cached{SYMMETRIC}", {}, 2),
    "tension": (TENSION, {}, 2),
    "mega batch": ("MegaBatchMarginLoss", {}, 2),
    "mega batch, at once": ("MegaBatchMarginLoss", dict(use_mini_batched_version=False), 2),
    "guided": ("GISTEmbedLoss", dict(temperature=0.1), 2),
    "guided, relative": ("GISTEmbedLoss", dict(temperature=0.1, **RELATIVE), 3),
    "cached, guided": ("CachedGISTEmbedLoss", dict(temperature=0.1, margin=0.05), 4),
    "several vectors": (SEVERAL, {}, 3),
    "several vectors, mean": (SEVERAL, dict(score_mini_batch_size=5, **MEAN), 2),
    "cached, several vectors": (f"Cached{SEVERAL}", dict(mini_batch_size=7), 3),
    "hardest": ("BatchHardTripletLoss", {}, 1),
    "hardest, cosine": ("BatchHardTripletLoss", dict(margin=0.2, **COSINE), 1),
    "hardest, soft": ("BatchHardSoftMarginTripletLoss", {}, 1),
    "hardest, soft, cosine": ("BatchHardSoftMarginTripletLoss", COSINE, 1),
    "semihard": ("BatchSemiHardTripletLoss", {}, 1),
    "semihard, cosine": ("BatchSemiHardTripletLoss", dict(margin=0.3, **COSINE), 1),
    "every": ("BatchAllTripletLoss", {}, 1),
    "every, cosine": ("BatchAllTripletLoss", dict(margin=0.2, **COSINE), 1),
}


def rows(kind: str, columns: int) -> list[Tensor]:
    """Columns of rows in float64, of float32's values."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(columns)]
    near = [(drawn[0] + 0.7 * each) / D**0.5 for each in drawn]
    return [hard_data.KINDS[kind](each, generator).float().double() for each in near]


class Model(nn.Module):
    """Gives the rows that its features hold, under one name or another."""

    max_seq_length = 8

    def __init__(self, name: str = "rows") -> None:
        super().__init__()
        self.name, self.calls = name, 0
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)

    def __getitem__(self, _: int) -> None:
        """A first module, which is no StaticEmbedding."""

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        self.calls += 1
        return {
            "sentence_embedding": features[self.name],
            "token_embeddings": features["rows"],
            "attention_mask": features.get("mask"),
        }


class Twice(Model):
    """The model of two in `ContrastiveTensionLossInBatchNegatives`, and the copy of it."""

    def __deepcopy__(self, _: Any) -> Model:
        return Model("other")


def tokens(kind: str, columns: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of each column texts of up to five tokens, and which are there."""
    generator = torch.Generator().manual_seed(3)
    found, masks = [], []
    for column in range(columns):
        drawn = torch.randn(N, 5, D, generator=generator, dtype=torch.float64) / D**0.5
        made = [hard_data.KINDS[kind](text, generator) for text in drawn]
        found.append(torch.stack(made).float().double())
        lengths = torch.randint(1, 6, (N,), generator=generator) if column else torch.full((N,), 4)
        masks.append(torch.arange(5) < lengths[:, None])
    return found, masks


def chunked(columns: list[Tensor]) -> list[list[Tensor]]:
    return [list(rows.split(7)) for rows in columns]


def outcome(name: str, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, then the gradient of each column."""
    cls, options, columns = CALLS[name]
    several, guided = SEVERAL in cls, "GIST" in cls
    drawn, masks = tokens(kind, columns) if several else (rows(kind, columns), [])
    given = [each.to(dtype).requires_grad_() for each in drawn]
    guides = [each.to(dtype) for each in rows("plain", columns + 1)[1:]]
    module = vectors if several else sparse if "Sparse" in cls else losses
    model = Twice() if cls == TENSION else Model()
    loss = getattr(module, cls)(model, **({"guide": Model("guide")} if guided else {}), **options)
    leaves = given + list(loss.to(dtype).parameters())
    if cls == TENSION:
        value = loss([dict(rows=given[0], other=given[1])], None)
    elif name == "mega batch, at once" or cls in ("GISTEmbedLoss", SEVERAL):
        held = zip(given, guides, masks or [None] * columns, strict=True)
        value = loss([dict(rows=x, guide=g, mask=m) for x, g, m in held], None)
    elif hasattr(loss, "calculate_loss"):
        parts = chunked(given)
        further = [chunked(guides)] if guided else [chunked(masks)] if several else []
        value = loss.calculate_loss(parts, *further)
        # as the cached forward calls it: rows without a graph, whose gradients are left in them
        apart = [[part.detach().requires_grad_() for part in column] for column in parts]
        again = loss.calculate_loss(apart, *further, with_backward=True)
        assert not again.requires_grad
        left = [torch.cat([part.grad for part in column]) for column in apart]
        return [value.detach(), *torch.autograd.grad(value, leaves), again, *left]
    else:
        value = loss.compute_loss_from_embeddings(given, torch.arange(N) % CLASSES)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_the_peers(name: str, kind: str, dtype: torch.dtype) -> None:
    # torch's softplus is linear beyond 20, and a row's slope is that of two distances
    left_out = 2 * math.exp(-20) if "soft" in name else 0.0
    cls = CALLS[name][0]
    each = lambda dtype: outcome(name, kind, dtype)
    calls = 2 if cls.startswith("Cached") or name == "mega batch" else 1
    # its scores are of float32 whatever the tokens are
    rounded = torch.float32 if SEVERAL in cls else None
    check_as_the_peer(PEER, cls, each, dtype, D, rounded=rounded, left_out=left_out, calls=calls)


def test_every_class_has_its_calls_or_its_sentence() -> None:
    table = integrations.table(PEER)
    told = {row.name for row in table.rows}
    assert {cls for cls, _, _ in CALLS.values()} == told
    public = {*losses.__all__, *vectors.__all__}
    public = {name for name in public if name.endswith("Loss")}
    assert public <= told | set(table.left) and not told & set(table.left)


class Towers(Model):
    """Embeds what its features hold, a mini-batch at a time."""

    def __init__(self, name: str = "rows") -> None:
        super().__init__(name)
        self.linear = nn.Linear(D, D, bias=False).double()
        self.linear.weight.data = (
            torch.eye(D).double() + torch.arange(D * D).view(D, D).double() / 99
        )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        return super().forward({**features, "rows": self.linear(features["rows"])})


TRAINED = [
    name
    for name, (cls, _, _) in CALLS.items()
    if cls.startswith("Cached") or cls == "MegaBatchMarginLoss"
]


@pytest.mark.parametrize("name", TRAINED)
def test_a_cached_loss_trains_its_model_as_the_peers(name: str) -> None:
    cls, options, columns = CALLS[name]
    several, guided = SEVERAL in cls, "GIST" in cls
    given, masks = tokens("plain", columns) if several else (rows("plain", columns), [])

    def step() -> list[Tensor]:
        model = Towers()
        module = vectors if several else losses
        made = {"guide": Model("guide")} if guided else {}
        loss = getattr(module, cls)(model, **made, **options)
        held = [dict(rows=x, input_ids=x[..., 0], guide=x) for x in given]
        for features, mask in zip(held, masks, strict=False):
            features |= dict(mask=mask, attention_mask=mask)
        value = loss(held, None)
        (2 * value).backward()
        assert model.linear.weight.grad is not None
        return [value.detach(), model.linear.weight.grad]

    want = step()
    with integrations.accelerate(PEER, strict=True) as acceleration:
        got = step()
        (ran,) = acceleration.report()
    assert ran.accelerated == 1
    # float32's scores of several vectors
    close = dict(rtol=1e-5, atol=1e-6) if several else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("cls", ["GISTEmbedLoss", f"Cached{RANKING}", "MegaBatchMarginLoss"])
def test_no_operation_returns_a_matrix_of_pairs(cls: str) -> None:
    n, generator = 512, torch.Generator().manual_seed(0)
    made = {"guide": Model("guide")} if "GIST" in cls else {}
    loss = getattr(losses, cls)(Towers(), **made)
    held = []
    for _ in range(2):
        x = torch.randn(n, D, generator=generator).double()
        held.append(dict(rows=x, input_ids=x[:, 0], guide=x.roll(1)))
    with integrations.accelerate(PEER, strict=True), Largest() as largest:
        loss(held, None).backward()
    assert n * D <= largest.most <= n * n // 4


def test_the_peers_cosines_of_pairs_are_seen() -> None:
    x = [torch.randn(64, D) for _ in range(2)]
    held = [dict(rows=rows, guide=rows) for rows in x]
    with Largest() as largest:
        losses.GISTEmbedLoss(Model(), Model("guide"))(held, None)
    assert largest.most >= 64 * 64 * D


def test_of_equal_texts_the_peer_keeps_each_row_and_itself() -> None:
    """Its guide does not find them nearer than the positive; the models embed once."""
    given = [each.requires_grad_() for each in rows("plain", 2)]
    held = [dict(rows=each, guide=given[0].detach()) for each in given]
    model, guide = Model(), Model("guide")
    loss = losses.GISTEmbedLoss(model, guide)
    want = loss(held, None)
    with integrations.accelerate(PEER) as acceleration:
        assert loss(held, None).equal(want)
        (ran,) = acceleration.report()
    assert ran == ("GISTEmbedLoss", 0, {"a row that its guide lets meet itself": 1})
    assert model.calls == guide.calls == 4


@pytest.mark.parametrize(
    "cls,options,why",
    [
        (RANKING, dict(similarity_fct=lambda a, b: a @ b.T), "a function that is not known"),
        (RANKING, dict(hardness_mode="all_negatives", hardness_strength=2.0), "hardness_mode"),
        ("BatchHardTripletLoss", dict(margin=-1.0), "margin=-1.0"),
    ],
)
def test_what_is_not_covered_is_the_peers_own(cls: str, options: dict, why: str) -> None:
    given = rows("plain", 2 if cls == RANKING else 1)
    labels = torch.arange(N) % CLASSES
    loss = getattr(losses, cls)(nn.Identity(), **options)
    want = loss.compute_loss_from_embeddings(given, labels)
    with integrations.accelerate(PEER) as acceleration:
        assert loss.compute_loss_from_embeddings(given, labels).equal(want)
        (ran,) = acceleration.report()
    assert ran.accelerated == 0 and why in next(iter(ran.left))


@pytest.mark.parametrize(
    "score,empty,why",
    [
        (scoring.colbert_scores, True, "a document without tokens"),
        (scoring.xtr_scores, False, "xtr_scores, a function that is not known"),
    ],
)
def test_other_scores_of_several_vectors_are_the_peers_own(
    score: Any, empty: bool, why: str
) -> None:
    given, masks = tokens("plain", 2)
    masks[1][3] &= not empty
    loss = getattr(vectors, SEVERAL)(Model(), similarity_fct=score)
    held = [dict(rows=x, mask=m) for x, m in zip(given, masks, strict=True)]
    want = loss(held)
    with integrations.accelerate(PEER) as acceleration:
        assert loss(held).equal(want)
        (ran,) = acceleration.report()
    assert ran == (SEVERAL, 0, {why: 1})
