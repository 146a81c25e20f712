"""The contrastive and metric losses: each against its formula, the authors' numbers, and itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import widest
from pair_cases import (
    BACKENDS,
    LOSSES,
    NEAR,
    SHAPES,
    Case,
    error,
    inputs_of,
    require_pairs,
    small_blocks,
)
from pair_formulas import supcon_rows
from pair_rows import eye, others
from places import GOLDEN
from row_loss_goldens import GOLDENS as ROW_GOLDENS
from torch import Tensor

from fused_losses import functional as fl

cases = partial(pytest.mark.parametrize, "case", LOSSES, ids=lambda case: case.name)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require_pairs(request.param)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_blocks(monkeypatch):
        yield


ONE_REDUCTION = (
    "nested_info_nce_rows",
    *("nested_margin_softmax_products", "nested_margin_softmax_some_rows"),
)


@cases()
def test_none_and_sum_agree(case: Case) -> None:
    symmetric = ("info_nce_labels_symmetric", "info_nce_weights", "info_nce_targets")
    if case.name.endswith(symmetric) or case.name.startswith("orthogonal"):
        pytest.skip("no loss of a row")
    if case.name in ONE_REDUCTION:
        pytest.skip("an example of one reduction")
    t = inputs_of(case, SHAPES["primes"], torch.float64)
    rows = case.call(t, backend="bounded", reduction="none")
    total = case.call(t, backend="bounded", reduction="sum")
    assert rows.dim() == total.dim() + 1
    if "symmetric" not in case.name:
        factor = 1
        if case.name.startswith("nt_xent"):
            same = t.labels[:, None] == t.labels
            factor = (same.sum(1) - 1) if "views" not in case.name else 1
        torch.testing.assert_close((rows * factor).sum(-1), total, rtol=1e-10, atol=1e-12)


# ---- what is special ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [100.0, 20.0])
def test_near_zero_loss_keeps_its_gradients(scale: float, backend: str) -> None:
    # positives at cosine 1 - 1e-4, negatives near 0: loss about e^-scale
    x = F.normalize(torch.randn(24, 32, dtype=torch.float64))
    y = F.normalize(x + 0.003 * torch.randn(24, 32, dtype=torch.float64))
    found = []
    for dtype in (torch.float64, torch.float32):
        a, b = (v.float().to(dtype).requires_grad_() for v in (x, y))
        which = "reference" if dtype == torch.float64 else backend
        loss = fl.info_nce(a, b, temperature=1 / scale, symmetric=True, backend=which)
        found.append((loss, *torch.autograd.grad(loss, (a, b))))
    for truth, got in zip(*found, strict=True):
        assert error(got.detach().double(), truth.detach(), 0) <= 1e-4


@pytest.mark.parametrize("form", ["out", "in"])
def test_near_zero_supcon_keeps_its_gradients(form: str, backend: str) -> None:
    centers = F.normalize(torch.randn(6, 16, dtype=torch.float64))
    labels = torch.arange(24) % 6
    x = F.normalize(centers[labels] + 0.01 * torch.randn(24, 16, dtype=torch.float64))

    def gradient(dtype: torch.dtype, loss: Callable[[Tensor], Tensor]) -> Tensor:
        a = x.float().to(dtype).requires_grad_()
        return torch.autograd.grad(loss(a), a)[0].double()

    def call(a: Tensor, backend: str = backend) -> Tensor:
        return fl.supervised_contrastive(a, labels, temperature=0.01, form=form, backend=backend)

    def eager(a: Tensor) -> Tensor:
        positive = others(labels)[0]
        everything = ~eye(len(a))
        return supcon_rows(a @ a.T / 0.01, positive, everything)[0].mean()

    truth = gradient(torch.float64, partial(call, backend="reference"))
    # "out" pulls each positive by its score against the others': float32 scores end its digits
    bound = 1e-4 if form == "in" else 1e-4 + 2 * error(gradient(torch.float32, eager), truth, 0)
    assert error(gradient(torch.float32, call), truth, 0) <= bound


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b, **o: fl.info_nce(a, b, temperature=0.2, symmetric=True, **o),
        lambda a, b, **o: fl.info_nce(a, b, temperature=0.2, queue=a, **o),
        lambda a, b, **o: fl.sigmoid_contrastive(a, b, **o),
    ],
)
def test_one_tensor_twice_gets_both_gradients(call: Callable[..., Tensor], backend: str) -> None:
    x = torch.randn(11, 5, dtype=widest(backend), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    once = torch.autograd.grad(call(x, x, backend=backend), x)[0]
    apart = torch.autograd.grad(call(x, y, backend=backend), (x, y))
    torch.testing.assert_close(once, sum(apart), **NEAR[x.dtype])


BATCHED = {
    "supervised_contrastive": fl.supervised_contrastive,
    "nt_xent": fl.nt_xent,
    "nt_xent_pairs": partial(fl.nt_xent, form="pairs"),
    "soft_nearest_neighbor": fl.soft_nearest_neighbor,
    "multi_similarity": partial(fl.multi_similarity, normalize=True),
    "multi_similarity_mined": partial(fl.multi_similarity, normalize=True, mining_margin=0.1),
    "circle": partial(fl.circle, normalize=True),
    "lifted_structure": fl.lifted_structure,
    "generalized_lifted_structure": fl.generalized_lifted_structure,
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("labels", ["all_alone", "all_alike", "duplicates", "none"])
def test_degenerate_batches_stay_finite(name: str, labels: str, backend: str) -> None:
    n = 0 if labels == "none" else 9
    x = torch.randn(n, 4, dtype=widest(backend))
    if labels == "duplicates":
        x = x[:3].repeat(3, 1)
    x.requires_grad_()
    numbers = {
        "all_alone": torch.arange(n),
        "all_alike": torch.zeros(n, dtype=torch.int64),
        "duplicates": torch.arange(n) % 3,
        "none": torch.arange(n),
    }[labels]
    loss = BATCHED[name](x, numbers, backend=backend)
    grad = torch.autograd.grad(loss, x)[0]
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    pulls_only = ("multi_similarity",)
    if labels == "all_alone" and name not in pulls_only:
        assert loss == 0 and (grad == 0).all()


def test_rows_without_positives_are_not_in_the_mean(backend: str) -> None:
    x, y = torch.randn(6, 4, dtype=widest(backend)), torch.randn(5, 4, dtype=widest(backend))
    labels, key_labels = torch.tensor([0, 1, 7, 8, 2, 2]), torch.tensor([0, 1, 2, 2, 3])
    call = partial(fl.info_nce, x, y, labels=labels, key_labels=key_labels, backend=backend)
    rows = call(reduction="none")
    assert (rows[2:4] == 0).all() and (rows[[0, 1, 4, 5]] > 0).all()
    torch.testing.assert_close(call(), rows.sum() / 4)
    torch.testing.assert_close(call(reduction="sum"), rows.sum())


def test_supcon_counts_lonely_anchors_as_asked(backend: str) -> None:
    x, labels = torch.randn(5, 4, dtype=widest(backend)), torch.tensor([0, 0, 1, 1, 2])
    rows = fl.supervised_contrastive(x, labels, reduction="none", backend=backend)
    assert rows[4] == 0
    for told, count in (("zero", 5), ("skip", 4)):
        loss = fl.supervised_contrastive(x, labels, without_positive=told, backend=backend)
        torch.testing.assert_close(loss, rows.sum() / count)


def test_nothing_but_the_positive_is_loss_zero(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    everything = torch.arange(4).repeat(4, 1)
    exclude = torch.where(everything == torch.arange(4)[:, None], -1, everything)
    loss = fl.info_nce(x, torch.randn(4, 3), exclude=exclude, backend=backend)
    assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
    assert fl.info_nce(x, x, exclude=everything, backend=backend) == 0


@pytest.mark.parametrize("reduction, wanted", [("mean", ()), ("sum", ()), ("none", (0,))])
def test_no_rows(reduction: str, wanted: tuple[int, ...], backend: str) -> None:
    x, y = torch.zeros(0, 3, requires_grad=True), torch.randn(4, 3)
    for loss in (
        fl.info_nce(x, y, reduction=reduction, backend=backend),
        fl.info_nce(x, x, symmetric=True, reduction=reduction, backend=backend),
        fl.sigmoid_contrastive(x, y, reduction=reduction, backend=backend),
        fl.supervised_contrastive(x, torch.zeros(0).long(), reduction=reduction, backend=backend),
    ):
        assert loss.shape == wanted and (loss == 0).all()
    assert torch.autograd.grad(loss.sum(), x)[0].shape == (0, 3)


def test_a_nan_row_keeps_to_itself(backend: str) -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    x[2] = torch.nan
    rows = fl.info_nce(x, y, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, False, True, False, False]


def test_symmetric_rows_are_the_mean_of_both_sides(backend: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    rows = fl.info_nce(x, y, symmetric=True, reduction="none", backend=backend)
    z = (x @ y.T).double() / 0.07
    wanted = (z.logsumexp(1) + z.logsumexp(0)[:4]) / 2 - z.diagonal()
    torch.testing.assert_close(rows.double(), wanted, rtol=1e-4, atol=1e-4)


def test_labels_of_any_integer_type_mean_the_same(backend: str) -> None:
    x = torch.randn(7, 3)
    labels = torch.tensor([5, 3, 5, 100, 3, 7, 7])
    wanted = fl.supervised_contrastive(x, labels, backend=backend)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert fl.supervised_contrastive(x, labels.to(dtype), backend=backend) == wanted
    assert fl.supervised_contrastive(x, labels * 2**50 - 2**60, backend=backend) == wanted


def test_non_contiguous_rows(backend: str) -> None:
    x, y = torch.randn(6, 9).T, torch.randn(18, 6)[::2]
    got = fl.info_nce(x, y, symmetric=True, backend=backend)
    assert got == fl.info_nce(x.contiguous(), y.contiguous(), symmetric=True, backend=backend)


def test_autocast_takes_the_keys_dtype(backend: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fl.info_nce(x, y, backend=backend)
    assert loss == fl.info_nce(x.bfloat16(), y, backend=backend) and loss.dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y, labels, **o: fl.info_nce(x, y, symmetric=True, normalize=True, **o),
        lambda x, y, labels, **o: fl.supervised_contrastive(x, labels, **o),
        lambda x, y, labels, **o: fl.nt_xent(x, labels, form="pairs", **o),
        lambda x, y, labels, **o: fl.multi_similarity(x, labels, mining_margin=0.1, **o),
    ],
    ids=["info_nce", "supervised_contrastive", "nt_xent", "multi_similarity"],
)
def test_compiles_whole(call: Callable[..., Tensor]) -> None:
    compiled = torch.compile(
        lambda *a: call(*a, backend="bounded"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (8, 11):
        x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
        labels = torch.arange(n) % 3
        got, wanted = (f(x, y, labels) for f in (compiled, partial(call, backend="bounded")))
        torch.testing.assert_close(got, wanted)
        grads = [torch.autograd.grad(loss, x)[0] for loss in (got, wanted)]
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()


def test_torch_func_grad() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    f = lambda a: fl.info_nce(a, y, symmetric=True, backend="bounded")
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(f)(x), torch.autograd.grad(f(leaf), leaf)[0])


# ---- the authors' numbers -----------------------------------------------------------------------

FOLDER = GOLDEN / "pairs"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]


def views(t: dict[str, Tensor]) -> Tensor:
    """[B, V, D] -> [V B, D], first views first, as the authors concatenate them."""
    return t["x"].transpose(0, 1).flatten(0, 1)


def first_pairs(t: dict[str, Tensor]) -> Tensor:
    """The first two rows of each class, [classes, 2]."""
    return torch.stack([(t["labels"] == c).nonzero()[:2, 0] for c in t["labels"].unique()])


SUPCON = {"temperature": 0.1, "base_temperature": 0.07, "normalize": True}
GOLDENS: dict[str, Callable[..., Tensor]] = {
    "openclip_ClipLoss": lambda t, **o: fl.info_nce(
        t["img"], t["txt"], temperature=1 / t["scale"], symmetric=True, normalize=True, **o
    ),
    "supcon_labels_one": lambda t, **o: fl.supervised_contrastive(
        views(t), t["labels"].repeat(2), anchor_count=16, **SUPCON, **o
    ),
    "supcon_simclr": lambda t, **o: fl.supervised_contrastive(
        views(t), torch.arange(16).repeat(2), **SUPCON, **o
    ),
    "pml_SupConLoss": lambda t, **o: fl.supervised_contrastive(
        t["x"], t["labels"], temperature=0.1, normalize=True, **o
    ),
    "msloss_orig_b40": lambda t, **o: fl.multi_similarity(
        t["x"], t["labels"], beta=40.0, mining_margin=0.1, normalize=True, **o
    ),
    "pml_MultiSimilarityLoss": lambda t, **o: fl.multi_similarity(
        t["x"], t["labels"], normalize=True, **o
    ),
    "pml_GeneralizedLiftedStructureLoss": lambda t, **o: fl.generalized_lifted_structure(
        t["x"], t["labels"], normalize=True, **o
    ),
    "opl_signed": lambda t, **o: fl.orthogonal_projection(t["x"], t["labels"], **o),
    "opl_abs": lambda t, **o: fl.orthogonal_projection(
        t["x"], t["labels"], gamma=2.0, absolute=True, **o
    ),
    "pml_NPairsLoss": lambda t, **o: fl.n_pairs(
        *t["x"][first_pairs(t)].unbind(1), normalize=True, **o
    ),
    "pml_ProxyNCALoss": lambda t, **o: fl.proxy_nca(
        t["x"], t["W"], t["labels"], normalize=True, **o
    ),
    "hoc_loss": lambda t, **o: fl.higher_order_compatibility(
        t["feat_new"], t["feat_old"], t["labels"], **o
    ),
    "cs_div": lambda t, **o: (
        fl.cauchy_schwarz_divergence(t["x"], t["y1"], t["y2"], **o)
        / torch.log(torch.tensor(2.0, dtype=torch.float64))
    ),
}


def golden_inputs(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of their gradients: feat_new has grad_new, param_W gradparam_W."""
    renamed = {"logit_scale": "scale", "param_proxies": "W"}
    return {renamed.get(k, k): v for k, v in data.items() if "grad" not in k and k != "loss"}


@pytest.mark.parametrize("name", GOLDENS)
def test_value_and_gradients_are_the_authors(name: str, backend: str) -> None:
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    t = golden_inputs(data)
    # what the authors computed in float64, a backend without it comes near in float32
    dtype = widest(backend)
    t = {k: v.to(dtype) if v.dtype == torch.float64 else v for k, v in t.items()}
    near = 1e-7 if dtype == torch.float64 else 2e-5
    grads = {re.sub("^grad(param)?_", "", k): v for k, v in data.items() if k.startswith("grad")}
    leaf = {"new": "feat_new", "proxies": "W"}
    names = [leaf.get(k, k) for k in grads]
    for leaf_name in names:
        t[leaf_name] = t[leaf_name].clone().requires_grad_()
    loss = GOLDENS[name](t, backend=backend)
    assert abs(loss - data["loss"]).item() <= near * abs(data["loss"].item())
    found = torch.autograd.grad(loss, [t[n] for n in names])
    for got, wanted in zip(found, grads.values(), strict=True):
        assert float((got - wanted).norm()) <= near * float(wanted.norm().clamp_min(1e-6))


def test_every_golden_is_asked() -> None:
    assert not set(GOLDENS) & set(ROW_GOLDENS)
    asked = set(GOLDENS) | set(ROW_GOLDENS)
    assert asked == {path.stem for path in FOLDER.glob("*.npz")} == set(INDEX)
