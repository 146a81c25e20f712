"""Modules over classes: the authors' numbers, a miner's indices, what they take and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from catalogue_table import CASES, built, drawn
from places import GOLDEN
from torch import Tensor, nn

import fused_losses
from fused_losses import losses
from fused_losses.losses.owned import ClassifierLoss

DOUBLE = torch.float64


def stored(name: str) -> dict[str, Tensor]:
    """A record of `tests/golden`, wherever it lies."""
    (path,) = GOLDEN.rglob(f"{name}.npz")
    with np.load(path) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def source(name: str) -> dict[str, Any]:
    (path,) = GOLDEN.rglob(f"{name}.npz")
    return json.loads((path.parent / "index.json").read_text())["entries"][name]


def loaded(module: nn.Module, **state: Tensor) -> nn.Module:
    """The module in float64 with these parameters and buffers for its own."""
    module = module.to(DOUBLE)
    own = module.state_dict()
    if any(name in own for name in ("weight",)) and "weight" not in state:
        own.pop("weight")  # comes by its former name
    module.load_state_dict(own | state)
    return module


def of_x_and_w(build: Callable[..., nn.Module], **options: Any) -> Callable[[dict], Any]:
    return lambda data: loaded(build(50, 16, **options), weight=data["w"])


def of_former(build: Callable[..., nn.Module], name: str, **options: Any) -> Callable[[dict], Any]:
    """By the state dict of pytorch-metric-learning's own module."""
    return lambda data: loaded(build(50, 16, **options), **{name: data[f"param_{name}"]})


def curricular(data: dict[str, Tensor]) -> nn.Module:
    state = {"weight": data["w"], "margin.t": data["t_before"].reshape(())}
    return loaded(losses.CurricularFaceLoss(50, 16), **state)


def ada_face(data: dict[str, Tensor]) -> nn.Module:
    momentum = source("adaface_AdaFace")["params"]["t_alpha"]
    averages = {f"margin.{k}": data[f"batch_{k}_before"].reshape(()) for k in ("mean", "std")}
    module = losses.AdaFaceLoss(50, 16, momentum=momentum)
    return loaded(module, weight=data["w"], **averages)


def mada_cos(data: dict[str, Tensor]) -> nn.Module:
    return loaded(losses.MadaCosLoss(50, 16, alpha=0.1), weight=data["w"])


def unpg(name: str, base: str) -> Callable[[dict], nn.Module]:
    params = source(name)["params"]
    own = dict(margin=params["m"], whisker=params["wisk"], scale=params["s"])
    return of_x_and_w(losses.UNPGLoss, base=base, **own)


BY_ROWS: dict[str, Callable[[dict[str, Tensor]], nn.Module]] = {
    "pml_ArcFaceLoss": of_former(losses.ArcFaceLoss, "W"),
    "pml_SubCenterArcFaceLoss": of_former(losses.SubCenterArcFaceLoss, "W"),
    "pml_CosFaceLoss": of_former(losses.CosFaceLoss, "W"),
    "pml_LargeMarginSoftmaxLoss": of_former(losses.LargeMarginSoftmaxLoss, "W"),
    "pml_SphereFaceLoss": of_former(losses.SphereFaceLoss, "W"),
    "pml_NormalizedSoftmaxLoss": of_former(losses.NormalizedSoftmaxLoss, "W"),
    "pml_SoftTripleLoss": of_former(losses.SoftTripleLoss, "fc"),
    "pml_ProxyNCALoss": of_former(losses.ProxyNCALoss, "proxies"),
    "elastic_ArcFace": of_x_and_w(losses.ArcFaceLoss, margin=np.degrees(0.5), beyond_pi="none"),
    "curricular_ArcFace": of_x_and_w(losses.ArcFaceLoss, margin=np.degrees(0.5)),
    "elastic_CosFace": of_x_and_w(losses.CosFaceLoss),
    "insightface_cos": of_x_and_w(losses.CosFaceLoss, margin=0.4),
    "insightface_arc": of_x_and_w(losses.CombinedMarginLoss),
    "insightface_arc_filter": of_x_and_w(
        losses.CombinedMarginLoss, interclass_filtering_threshold=0.4
    ),
    "magface_easy": of_x_and_w(losses.MagFaceLoss),
    "curricular_CurricularFace": curricular,
    "adaface_AdaFace": ada_face,
    "sface": of_x_and_w(losses.SFaceLoss),
    "madacos_hard": mada_cos,
    "unpg_CosFace_wisk1.0": unpg("unpg_CosFace_wisk1.0", "cos"),
    "unpg_ArcFace_wisk1.5": unpg("unpg_ArcFace_wisk1.5", "arc"),
}


def agree(got: Tensor, want: Tensor, within: float = 1e-9) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= within * float(want.norm())


@pytest.mark.parametrize("name", BY_ROWS)
def test_the_authors_numbers(name: str) -> None:
    data = stored(name)
    module = BY_ROWS[name](data)
    x = data["x"].requires_grad_()
    loss = module(x, data["labels"])
    agree(loss.detach(), data["loss"])
    of_x, of_weight = torch.autograd.grad(loss, (x, module.weight))
    agree(of_x, data["grad_x"])
    (former,) = [k for k in data if k.startswith(("grad_w", "gradparam_"))]
    want = data[former]
    if former in ("gradparam_W", "gradparam_fc"):
        want = want.T.reshape(of_weight.shape)
    agree(of_weight, want)


def test_p2s_grad_is_the_authors_in_float32() -> None:
    data = stored("pml_P2SGradLoss")
    module = loaded(losses.P2SGradLoss(16, 50), weight=data["param_weight"])
    x = data["x"].requires_grad_()
    loss = module(x, data["labels"])
    # they bring the centres to norm 1 by factors of 1e-5 and 1e5, 1e-7 off
    agree(loss.detach(), data["loss"], 1e-6)
    agree(torch.autograd.grad(loss, x)[0], data["grad_x"], 1e-6)


@pytest.mark.parametrize("drawn_by", ["elastic_ElasticArcFace_plus", "elastic_ElasticCosFace"])
def test_elastic_face_with_the_authors_draws(
    drawn_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stored(drawn_by)
    base, plus = ("arc", "reference") if "Arc" in drawn_by else ("cos", None)
    module = loaded(losses.ElasticFaceLoss(50, 16, base, plus=plus), weight=data["w"])
    monkeypatch.setattr(type(module.head()), "draw", lambda _, cosine: data["sampled_margin"])
    x = data["x"].requires_grad_()
    loss = module(x, data["labels"])
    agree(loss.detach(), data["loss"])
    agree(torch.autograd.grad(loss, x)[0], data["grad_x"])


def test_sphereface2_is_opensphere() -> None:
    # its gradient of the (unit) weight lacks the projection: products in the place of cosines
    data = stored("opensphere_SphereFace2")
    options: dict[str, Any] = dict(gradient="straight_through", normalize=False)
    module = losses.SphereFace2Loss(50, 16, **options)
    assert abs(module.bias.item() - data["bias"].item()) <= 1e-6
    unit = [t / t.norm(dim=1, keepdim=True) for t in (data["x"], data["w"])]
    module = loaded(module, weight=unit[1], bias=data["bias"].reshape(()))
    loss = module(unit[0], data["labels"])
    agree(loss.detach(), data["loss"])
    of_weight, of_bias = torch.autograd.grad(loss, (module.weight, module.bias))
    agree(of_weight, data["grad_w"])
    agree(of_bias, data["grad_bias"].reshape(()))


SCORES: dict[str, Callable[[], nn.Module]] = {
    "ldr_TruncGCE": lambda: losses.TruncatedGCELoss(10, 10, k=0.3),
    "ldr_AGCE": lambda: losses.AGCELoss(10, 10),
    "ldr_SCE": lambda: losses.SCELoss(10, 10, 0.5, 0.5),
    "ldr_MSE": lambda: losses.MSELoss(10, 10),
    "ldr_CS": lambda: losses.CrammerSingerLoss(10, 10),
    "ldr_WW": lambda: losses.WestonWatkinsLoss(10, 10),
    "ldr_LDR": lambda: losses.LDRLoss(10, 10),
    "ldr_ALDR": lambda: losses.ALDRLoss(10, 10, 32),
    "biasloss_global": lambda: losses.BiasLoss(50, 50),
    "biasloss_local": lambda: losses.BiasLoss(50, 50, within="local"),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_authors_numbers_of_scores(name: str) -> None:
    """Scores as products with the identity."""
    data = stored(name)
    x = data["logits"].to(DOUBLE).requires_grad_()
    module = loaded(SCORES[name](), weight=torch.eye(x.shape[1], dtype=DOUBLE))
    more: dict[str, Any] = {}
    if name == "ldr_ALDR":
        more["samples"] = torch.arange(32)
    if name.startswith("bias"):
        more["features"] = data["features"].to(DOUBLE)
    loss = module(x, data["labels"], **more)
    agree(loss.detach(), torch.tensor(source(name)["loss"], dtype=DOUBLE))
    agree(torch.autograd.grad(loss, x)[0], data["grad_logits"].to(DOUBLE))


def test_z_loss_is_the_authors() -> None:
    """Their step of 0.1 tells the gradient of the weight."""
    data = stored("spherical_z_loss")
    module = loaded(losses.ZLoss(40, 8, reduction="sum"), weight=data["W"])
    x = data["H"].requires_grad_()
    loss = module(x, data["idx"][:, 0].long())
    agree(loss.detach(), data["loss"])
    of_x, of_weight = torch.autograd.grad(loss, (x, module.weight))
    agree(of_x, data["grad_H"])
    agree(of_weight, (data["W"] - data["W_new"]) / 0.1)


def test_the_simplex_is_the_authors() -> None:
    data = stored("dsimplex_5")
    rows = losses.DSimplexLoss(5).head.rows(torch.arange(5), DOUBLE)
    torch.testing.assert_close(rows, data["weights"], rtol=0, atol=2e-8)  # their 1e-8 of a norm


# ---- a miner's indices, and what has no meaning -------------------------------------------------

OWNED = [n for n, c in CASES.items() if isinstance(c.build(3), ClassifierLoss)]
WHOLE = ("ProxyAnchorLoss", "UNPGLoss", "MadaCosLoss")  # whose rows meet: weights change more


def indices() -> tuple[Tensor, ...]:
    """Row 0 four times, row 2 twice, rows 5, 7 and 8 once, the others never."""
    return torch.tensor([0, 0, 0]), torch.tensor([0, 2, 2]), torch.tensor([5, 7, 8])


def with_pairs() -> tuple[Tensor, ...]:
    """Row 0 four times, row 2 twice, rows 5 and 7 once."""
    return torch.tensor([0, 0, 0]), torch.tensor([2, 2, 5]), torch.tensor([0]), torch.tensor([7])


@pytest.mark.parametrize("given", [indices, with_pairs])
@pytest.mark.parametrize("name", [n for n in OWNED if n not in WHOLE])
def test_indices_are_weights_of_rows(name: str, given: Callable[[], tuple]) -> None:
    call = drawn(name, 19, 8)

    def found(*indices: Any, reduction: str = "mean", **more: Any) -> Tensor:
        module = built(name, 8, reduction=reduction)
        torch.manual_seed(0)
        return module(*call.arguments, *indices, **call.options, **more)

    weights = torch.zeros(19, dtype=DOUBLE)
    weights[[0, 2, 5, 7]] = torch.tensor([1, 0.5, 0.25, 0.25], dtype=DOUBLE)
    weights[8] = 0.25 if given is indices else 0
    got = found(given())
    each = found(reduction="none", row_weight=weights)
    assert each.shape == (19,)
    torch.testing.assert_close(got, each.sum() / 19, rtol=1e-12, atol=0)
    none = found((torch.zeros(0, dtype=torch.int64),) * 3)
    torch.testing.assert_close(none, found(), rtol=1e-12, atol=0)
    assert got != none


def test_indices_against_the_formula() -> None:
    """mean over all rows of w_i loss_i, as pytorch-metric-learning has it."""
    module, (x, labels) = built("CosFaceLoss", 8), drawn("CosFaceLoss", 19, 8).arguments
    leaf = x.clone().requires_grad_()
    got = module(leaf, labels, indices())
    z = torch.nn.functional.normalize(leaf) @ torch.nn.functional.normalize(module.weight).T
    z = 64 * (z - 0.35 * torch.nn.functional.one_hot(labels, 11).double())
    each = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    want = (each[0] + each[2] / 2 + each[[5, 7, 8]].sum() / 4) / 19
    agree(got.detach(), want.detach())
    agree(torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, leaf)[0])


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (dict(indices=3), TypeError, r"indices: expected \(a, p, n\)"),
        (dict(indices=(torch.tensor([0]),) * 2), ValueError, r"indices: expected \(a, p, n\)"),
        (dict(indices=(torch.tensor([0.0]),) * 3), TypeError, r"indices\[0\]: expected an int64"),
        (dict(indices=(torch.tensor([19]),) * 3), IndexError, r"indices\[0\]: expected rows"),
        (dict(ref_emb=torch.ones(2, 8)), ValueError, "ref_emb: expected None of ArcFaceLoss"),
        (dict(ref_labels=torch.ones(2)), ValueError, "ref_labels: expected None of ArcFaceLoss"),
    ],
)
def test_what_is_refused(given: dict[str, Any], kind: type[Exception], words: str) -> None:
    module, call = built("ArcFaceLoss", 8), drawn("ArcFaceLoss", 19, 8)
    with pytest.raises(kind, match=words):
        module(*call.arguments, **given)


def test_proxy_anchor_moves_the_scores_of_listed_rows() -> None:
    """By w - 1 with w of 1, 1/2, 1/4 and 0: pytorch-metric-learning's formula."""
    module, call = built("ProxyAnchorLoss", 8), drawn("ProxyAnchorLoss", 19, 8)
    x, labels = call.arguments
    leaf = x.clone().requires_grad_()
    got = module(leaf, labels, indices())
    move = torch.full((19,), -1.0, dtype=DOUBLE)
    move[[0, 2, 5, 7, 8]] = torch.tensor([0, -0.5, -0.75, -0.75, -0.75], dtype=DOUBLE)
    normalize = torch.nn.functional.normalize
    s = normalize(module.weight) @ normalize(leaf).T
    own = torch.arange(len(s))[:, None] == labels
    attract, repel = (
        torch.where(kept, (sign * 32 * (s - sign * -0.1) + move).exp(), 0).sum(1).log1p()
        for kept, sign in ((own, -1), (~own, 1))
    )
    want = attract.sum() / own.any(1).sum() + repel.mean()
    agree(got.detach(), want.detach())
    agree(torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, leaf)[0])
    nothing = (torch.zeros(0, dtype=torch.int64),) * 3
    assert module(x, labels, nothing) == module(x, labels) != got
    with pytest.raises(ValueError, match="whose terms are the proxies' and not the rows'"):
        module(x, labels, row_weight=torch.ones(19, dtype=DOUBLE))


@pytest.mark.parametrize("name", ["CenterLoss", "P2SGradLoss", "ZLoss", "OCALoss"])
def test_rows_without_a_label_take_no_part(name: str) -> None:
    module, (x, labels) = built(name, 8), drawn(name, 19, 8).arguments
    x, labels = x.clone(), labels.clone()
    x[3], labels[3] = torch.nan, -100
    leaf, kept = x.requires_grad_(), torch.arange(19) != 3
    loss = module(leaf, labels)
    agree(loss.detach(), module(x.detach()[kept], labels[kept]).detach(), 1e-12)
    assert torch.autograd.grad(loss, leaf)[0][3].eq(0).all()
    assert module(x.detach()[:0], labels[:0]) == 0
    with pytest.raises(ValueError, match=r"embeddings: expected \[N, 8\]"):
        module(torch.ones(2, 5, dtype=DOUBLE), labels[:2])


@pytest.mark.parametrize("name", [n for n in OWNED if CASES[n].explains])
def test_nothing_as_large_as_all_scores(name: str) -> None:
    """Of 2,048 rows and 16,384 classes the scores are 128 MiB, the centres half of one."""
    n, c = 2048, 16384
    module = CASES[name].build(8)
    wide = module.weight.new_empty(c, *module.weight.shape[1:]).normal_()
    module.weight, module.num_classes = nn.Parameter(wide), c
    if name == "OCALoss":
        module.prototypes = torch.randn(c, 7)
    call = drawn(name, n, 8)
    arguments = tuple(t.float() if t.is_floating_point() else t for t in call.arguments)
    options = {
        k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in call.options.items()
    }
    plan = fused_losses.explain(module, *arguments, **options)
    assert plan.peak_extra_bytes < 2 * n * c  # half of the scores of one centre a class


# ---- the form of MLCD that came after -----------------------------------------------------------


def several_softmaxes(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """A margin softmax a label, over all classes."""
    unit = [t / t.norm(dim=1, keepdim=True) for t in (x, module.weight)]
    rows = []
    for row, mine in zip(unit[0] @ unit[1].T, labels, strict=True):
        each = []
        for p in mine[mine >= 0]:
            z = 64 * torch.where(torch.arange(len(row)) == p, row - 0.3, row)
            each.append(z.logsumexp(0) - z[p])
        rows.append(torch.stack(each).mean())
    return torch.stack(rows).mean()


def test_mlcd_of_softmaxes() -> None:
    torch.manual_seed(0)
    module = losses.MLCDLoss(11, 8, form="softmax").to(DOUBLE)
    generator = torch.Generator().manual_seed(0)
    x, labels = CASES["MLCDLoss"].call(19, 8, torch.arange(19), generator).arguments
    leaf = x.requires_grad_()
    got = module(leaf, labels)
    want = several_softmaxes(module, leaf, labels)
    agree(got.detach(), want.detach())
    leaves = leaf, module.weight
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        agree(a, b)
    with pytest.raises(ValueError, match="form: expected one of sums, softmax"):
        losses.MLCDLoss(11, 8, form="both")
