"""Contrastive modules beyond what all of the catalogue is asked: goldens, calls of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from catalogue_table import CASES
from conftest import require
from places import GOLDEN
from torch import Tensor, nn

import fused_losses
from fused_losses import losses
from fused_losses.functions.multiple_negatives import DIRECTIONS


def golden(name: str) -> dict[str, Tensor]:
    (path,) = GOLDEN.rglob(f"{name}.npz")
    with np.load(path) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= 1e-9 * want.norm())


def test_clip_is_open_clips() -> None:
    t = golden("openclip_ClipLoss")
    image, text, scale = (t[k].requires_grad_() for k in ("img", "txt", "logit_scale"))
    given = (nn.functional.normalize(side, dim=1) for side in (image, text))
    loss = losses.ClipLoss()(*given, scale)
    assert near(loss, t["loss"])
    found = torch.autograd.grad(loss, (image, text, scale))
    for got, name in zip(found, ("grad_img", "grad_txt", "grad_scale"), strict=True):
        assert near(got, t[name]), name


def test_the_scale_of_a_module_is_the_scale_that_is_given() -> None:
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    clip, siglip = losses.ClipLoss(0.1).double(), losses.SigLipLoss(4.0, -2.0).double()
    # what they hold was a float32 first
    for module, given in ((clip, (10.0,)), (siglip, (4.0, -2.0))):
        torch.testing.assert_close(module(x, y), module(x, y, *given), rtol=1e-6, atol=0)
    assert not list(losses.ClipLoss(learnable=False).parameters())
    assert math.isclose(losses.SigLipLoss(learnable=False).logit_bias.item(), -10)


def test_hoc_is_its_authors() -> None:
    t = golden("hoc_loss")
    new, old = t["feat_new"].requires_grad_(), t["feat_old"]
    loss = losses.HOCLoss()(new, old, t["labels"])
    assert near(loss, t["loss"])
    assert near(torch.autograd.grad(loss, new)[0], t["grad_new"])


def test_amcl_is_its_authors() -> None:
    t = golden("amcl_ntxent")
    amcl = losses.AMCLLoss(16, 5).double()
    amcl.load_state_dict(
        {
            f"phi.{layer}.{kind}": t[f"param_temperature_phi_{layer}_{kind}"]
            for layer in (0, 2)
            for kind in ("weight", "bias")
        }
    )
    views = [t[k].requires_grad_() for k in ("z1", "z2")]
    loss = amcl(*views)
    assert near(loss, t["loss"])
    found = torch.autograd.grad(loss, [*views, *amcl.parameters()])
    names = ["grad_z1", "grad_z2"]
    names += [
        f"gradparam_temperature_phi_{k}" for k in ("0_weight", "0_bias", "2_weight", "2_bias")
    ]
    for got, name in zip(found, names, strict=True):
        assert near(got, t[name]), name


def test_unime_is_its_authors() -> None:
    t = golden("unimev2_symkl")
    scores = t["scores"].requires_grad_()
    loss = losses.UniMEKLLoss()(scores, t["judge"])
    assert near(loss, t["loss"])
    assert near(torch.autograd.grad(loss, scores)[0], t["grad_scores"])


@pytest.mark.parametrize("share", [0.07, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_a_share_is_so_many_negatives_whatever_ties(share: float, backend: str) -> None:
    # every negative scores the same: their number alone tells
    n = 101
    query, key = torch.ones(n, 2), torch.ones(n, 2)
    loss = losses.HardContrastiveLoss(share, backend=backend)(query, key)
    count = round(share * 100)
    torch.testing.assert_close(loss, torch.tensor(1.0 + count).log())


def test_of_equal_negatives_the_first_are_hardest(backend: str) -> None:
    key = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    query = torch.tensor([[1.0, 0.0]])
    labels, key_labels = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1, 1, 1])
    hard = losses.HardContrastiveLoss(0.5, normalize=False, temperature=1.0, backend=backend)
    hard(query, key, labels, key_labels).backward()
    assert key.grad is not None
    assert key.grad.any(dim=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.3), ("relative", 0.3)]
)
@pytest.mark.parametrize("pairs_of", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("exact", ["reference", "bounded", "cpu"])
def test_a_guide_leaves_out(
    strategy: str, margin: float, pairs_of: tuple[bool, bool], exact: str
) -> None:
    n = 9
    a, p, a_guide, p_guide = torch.randn(4, n, 5, dtype=torch.float64)
    gist = losses.GISTEmbedLoss(
        0.2,
        margin,
        margin_strategy=strategy,
        contrast_anchors=pairs_of[0],
        contrast_positives=pairs_of[1],
        reduction="none",
        backend=require(exact),
    )
    cosine = lambda x, y: nn.functional.normalize(x, dim=1) @ nn.functional.normalize(y, dim=1).T
    bound = cosine(a_guide, p_guide).diagonal()[:, None]
    bound = bound - margin * (bound.abs() if strategy == "relative" else 1)
    own = torch.eye(n, dtype=torch.bool)
    every = [(cosine(a, p), ~own & (cosine(a_guide, p_guide) > bound))]
    if pairs_of[0]:
        every.append((cosine(a, a), own | (cosine(a_guide, a_guide) > bound)))
    if pairs_of[1]:
        every.append((cosine(p, p), own | (cosine(p_guide, p_guide) > bound)))
    z = torch.cat([(s / 0.2).masked_fill(out, -torch.inf) for s, out in every], dim=1)
    torch.testing.assert_close(gist(a, p, a_guide, p_guide), z.logsumexp(1) - z.diagonal())


def test_a_copy_of_the_positive_is_left_out_by_no_rounding(backend: str) -> None:
    # its guide's score is the bound itself, and not above it
    rows = torch.randn(1, 33).expand(65, 33)
    gist = losses.GISTEmbedLoss(1.0, contrast_anchors=False, contrast_positives=False)
    gist.backend = backend
    loss = gist(rows, rows, torch.randn(65, 1).abs().expand(65, 7), torch.ones(65, 7))
    torch.testing.assert_close(loss, torch.tensor(65.0).log())


@pytest.mark.parametrize("ways", [DIRECTIONS[:1], DIRECTIONS[::2], DIRECTIONS])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_directions_of_ranked_negatives(ways: tuple[str, ...], partition: str) -> None:
    for n in (1, 6):
        given = [
            torch.randn(n, *shape, dtype=torch.float64, requires_grad=True)
            for shape in ((5,), (5,), (2, 5))
        ]
        module = losses.MultipleNegativesRankingLoss(directions=ways, partition_mode=partition)
        want = CASES["MultipleNegativesRankingLoss"].formula(module, *given)
        got = module(*given)
        assert near(got, want)
        for slope, truth in zip(
            torch.autograd.grad(got, given), torch.autograd.grad(want, given), strict=True
        ):
            assert (slope - truth).norm() <= 1e-9 * truth.norm() + 1e-12
    plain = losses.MultipleNegativesRankingLoss(directions=ways, partition_mode=partition)
    assert plain(torch.randn(4, 3), torch.randn(4, 3)).isfinite()


REFUSED = [
    (
        losses.MultipleNegativesRankingLoss(directions=("doc_to_doc",)),
        (torch.ones(2, 3),) * 2,
        "directions: expected query_to_doc",
    ),
    (losses.MultipleNegativesRankingLoss(), (torch.ones(2, 3), torch.ones(3, 3)), "positive: exp"),
    (losses.HardContrastiveLoss(0.0), (torch.ones(2, 3),) * 2, r"share: expected a value in"),
    (losses.GISTEmbedLoss(), (torch.ones(2, 3),) * 3 + (torch.ones(2, 4),), "positive_guide"),
    (losses.GISTEmbedLoss(margin_strategy="no"), (torch.ones(2, 3),) * 4, "strategy: expected"),
    (losses.CriSpLoss(), (torch.ones(2, 1, 3), torch.ones(2, 1, 3), torch.ones(2, 3)), "mask: exp"),
    (losses.CriSpLoss(), (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)), "query: expected"),
    (losses.AMCLLoss(3), (torch.ones(2, 3), torch.ones(2, 3)), r"expected \[N, H, D\]"),
    (losses.UniMEKLLoss(), (torch.ones(2, 3), torch.ones(3, 3)), "judged: expected shape"),
    (losses.AlignmentLoss(), (torch.ones(2, 3), torch.ones(3, 3)), "y: expected shape"),
]


@pytest.mark.parametrize(("module", "given", "told"), REFUSED)
def test_what_is_refused(module: nn.Module, given: tuple[Tensor, ...], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        module(*given)


def test_what_banks_are_told_of_is_checked() -> None:
    x, bank, of_bank = torch.randn(4, 3), torch.randn(5, 3), torch.arange(5)
    for name, rows in (("queue_ids", "ids"), ("queue_groups", "groups")):
        with pytest.raises(ValueError, match=f"{name}: expected {rows} for the queries"):
            fused_losses.info_nce(x, x, queue=bank, **{name: of_bank})
        given = {rows: torch.arange(4)}
        with pytest.raises(ValueError, match=f"{name}: expected one tensor a bank"):
            fused_losses.info_nce(x, x, queue=[bank, bank], **{name: of_bank}, **given)
        with pytest.raises(ValueError, match=name):
            fused_losses.info_nce(x, x, queue=bank, **{name: of_bank[1:]}, **given)


def test_a_queue_takes_keys_in_turn() -> None:
    moco = losses.MoCoLoss(3, 5)
    first = moco.queue.clone()
    keys = nn.functional.normalize(torch.randn(9, 3), dim=1)
    moco.enqueue(3 * keys[:3])
    assert torch.equal(moco.queue[3:], first[3:])
    torch.testing.assert_close(moco.queue[:3], keys[:3])
    moco.enqueue(keys[3:6])
    torch.testing.assert_close(moco.queue, keys[[5, 1, 2, 3, 4]])
    moco.enqueue(keys)
    torch.testing.assert_close(moco.queue[moco.place :], keys[4 : 9 - int(moco.place)])
    with pytest.raises(ValueError, match=r"keys: expected shape \[N, 3\]"):
        moco.enqueue(torch.randn(2, 4))


def test_two_views_are_of_one_shape() -> None:
    with pytest.raises(ValueError, match=r"second: expected shape \(4, 3\)"):
        losses.SimCLRLoss()(torch.randn(4, 3), torch.randn(5, 3))


def test_a_plan_knows_what_a_module_holds() -> None:
    query, key = torch.randn(2, 8, 4)
    small, large = (losses.MoCoLoss(4, size) for size in (8, 4096))
    plans = [fused_losses.explain(m, query, key).peak_extra_bytes for m in (small, large)]
    # the queue is the module's, its rows of norm 1 are the call's
    assert 4096 * 4 * 4 <= plans[1] - plans[0]
