"""The large-class head in one process, against the losses that it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from class_center_cases import C, D, N, data, gradients, head, same
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_losses import class_losses, margins
from fused_losses.centers.collectives import Ranks
from fused_losses.centers.engines import Gradients, SoftmaxEngine
from fused_losses.centers.sampling import sample
from fused_losses.centers.shard import ClassGroup, Shard, ShardSweep
from fused_losses.functions import class_loss
from fused_losses.functions.adaptive_scale import AdaptiveScale, adaptive_margin_softmax
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.unpg import UNPG, unpg_margin_softmax

MARGINS = {
    "none": lambda: None,
    "arcface": lambda: margins.ArcFace(0.5),
    "combined": lambda: margins.CombinedMargin(1.1, 0.2, 0.1),
    "adaface": lambda: margins.AdaFace(),
    "magface": lambda: margins.MagFace(l_a=0.5, u_a=4.0),
}


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_is_margin_softmax(name: str, gradient: str) -> None:
    x, y = data()
    found = head(margin=MARGINS[name](), gradient=gradient)
    weight = found.weight.detach().clone().requires_grad_()
    expected = margin_softmax(
        x, weight, y, margin=MARGINS[name](), scale=16.0, gradient=gradient, backend="reference"
    )
    same(gradients(found(x, y), x, found.weight), gradients(expected, x, weight))


LOSSES = {
    "softmax of several labels": (lambda: class_losses.Softmax(margins.CosFace(0.2), 16.0), 1, 3),
    "labels together": (
        lambda: class_losses.LabelsTogether(margins.CosFace(0.2), 16.0),
        1,
        3,
    ),
    "sub-centres": (lambda: class_losses.Softmax(margins.ArcFace(0.3), 16.0), 3, 1),
    "soft triple": (lambda: class_losses.SoftTriple(), 3, 1),
    "sface": (lambda: class_losses.SFace(), 1, 1),
    "sphereface2": (lambda: class_losses.SphereFace2(0.3), 1, 1),
    "mlcd": (lambda: class_losses.MLCD(16.0), 1, 4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_is_class_loss(name: str) -> None:
    make, centers, labels = LOSSES[name]
    x, y = data(labels=labels)
    found = head(margin=make(), sub_centers=centers)
    weight = found.weight.detach().clone().requires_grad_()
    expected = class_loss.class_loss(x, weight, y, make(), backend="reference")
    same(gradients(found(x, y), x, found.weight), gradients(expected, x, weight))


def test_sphereface2_bias_learns() -> None:
    x, y = data()
    answers = []
    for sharded in (True, False):
        bias = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = class_losses.SphereFace2(bias)
        found = head(margin=loss)
        if sharded:
            value = found(x, y)
        else:
            value = class_loss.class_loss(x, found.weight, y, loss, backend="reference")
        answers.append(gradients(value, bias))
    same(*answers)


def test_adaptive_scale() -> None:
    x, y = data()
    found = head(margin=AdaptiveScale(smallest=2.0))
    weight = found.weight.detach().clone().requires_grad_()
    expected = adaptive_margin_softmax(x, weight, y, margin=AdaptiveScale(smallest=2.0))
    same(gradients(found(x, y), x, found.weight), gradients(expected, x, weight))


def test_shared_negatives() -> None:
    x, y = data()
    found = head(batch_negatives=UNPG(1.0))
    weight = found.weight.detach().clone().requires_grad_()
    expected = unpg_margin_softmax(
        x, weight, y, margin=margins.ArcFace(), negatives=UNPG(1.0), scale=16.0, backend="reference"
    )
    same(gradients(found(x, y), x, found.weight), gradients(expected, x, weight))


@pytest.mark.parametrize("log_q", [False, True])
def test_sampled_is_the_loss_over_the_drawn_classes(log_q: bool) -> None:
    x, y = data()
    found = head(sample_rate=0.4, log_q=log_q, seed=5)
    drawn = sample(0, C, 0.4, seed=5, step=0)
    own = y[y >= 0].unique()
    part = torch.cat([drawn, own]).unique()
    weight = found.weight.detach().clone().requires_grad_()
    bias = None
    if log_q:
        chance = torch.full((C,), 0.4, dtype=torch.float64).index_fill(0, own, 1.0)
        bias = -chance.log()
    expected = margin_softmax(
        x, weight, y, scale=16.0, classes=part, bias=bias, backend="reference"
    )
    answer = gradients(found(x, y), x, found.weight)
    assert answer[2].is_sparse and set(answer[2].coalesce().indices()[0].tolist()) == set(
        part.tolist()
    )
    same(answer, gradients(expected, x, weight))
    assert found.step_count == 1
    found.eval()
    full = margin_softmax(x, weight, y, scale=16.0, backend="reference")
    torch.testing.assert_close(found(x, y), full, rtol=1e-10, atol=1e-10)
    assert found.step_count == 1


def test_the_corrected_sums_are_unbiased() -> None:
    """The mean over many samples of sum exp z is that over all classes."""
    x, y = data()
    rows = torch.randn(C, D, dtype=torch.float64)
    found = head(sample_rate=0.3, log_q=True, margin=None, scale=1.0, normalize=False)
    with torch.no_grad():
        found.weight.copy_(rows)
    valid = y >= 0
    z = (x @ rows.T).detach()[valid]
    target = z.gather(1, y[valid, None])[:, 0]
    others = (z.exp().sum(1) - target.exp()).log()
    sums = []
    for step in range(400):
        found.set_extra_state({"steps": step, "optimizer": {}})
        taken: list[Tensor] = []
        found.margin = _Recorder(taken)
        found(x, y)
        sums.append(taken[0][valid].exp())
    mean = torch.stack(sums).mean(0)
    spread = torch.stack(sums).std(0) / 20
    assert ((mean - others.exp()).abs() < 4.5 * spread).all()


class _Recorder(class_losses.Softmax):
    def __init__(self, taken: list[Tensor]) -> None:
        super().__init__(None, 1.0)
        object.__setattr__(self, "taken", taken)

    def row_loss(self, rows: class_losses.MergedRows) -> Tensor:
        self.taken.append(rows.statistics[0].detach())
        return super().row_loss(rows)


def test_no_rows_and_no_labels() -> None:
    found = head()
    x = torch.zeros((0, D), dtype=torch.float64, requires_grad=True)
    loss = found(x, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, D) and found.weight.grad.abs().max() == 0
    x = torch.full((3, D), torch.nan, dtype=torch.float64, requires_grad=True)
    loss = found(x, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and x.grad.abs().max() == 0 and found.weight.grad.abs().max() == 0


def test_what_a_step_knows_of_its_rows() -> None:
    x, y = data()
    found = head()
    _, stats = found(x, y, return_stats=True)
    _, expected = margin_softmax(
        x, found.weight, y, scale=16.0, return_stats=True, backend="reference"
    )
    torch.testing.assert_close(stats.target_cosine, expected.target_cosine)
    assert torch.equal(stats.hit, expected.hit) and not stats.hit[3]


@pytest.mark.parametrize("ids", [None, [0, 3, 4, 11, 30, 56]])
def test_chunks_that_move_give_the_same(ids: list[int] | None) -> None:
    """The path of a table on another device than the products', with both on this one."""
    x, y = data()
    x = torch.nn.functional.normalize(x.detach())
    labels = torch.where(y < 0, -1, y)
    rows = None if ids is None else torch.tensor(ids)
    if rows is not None:
        labels = torch.where(torch.isin(labels, rows), labels, -1)
    answers = []
    for moves in (False, True):
        shard = Shard(head().weight.detach(), labels[:, None], x.device, 10 * D * 8, moves)
        engine = SoftmaxEngine(16.0, True, "fp32", None)
        sweep = ShardSweep(shard, [ClassGroup(rows)], engine)
        found = sweep.forward(x, None)
        parts = list(
            sweep.gradients(
                Gradients(*found[:2]), found.statistics, x, None, need_x=True, need_weight=True
            )
        )
        answers.append(
            [
                *found,
                sum(dx for _, dx, _ in parts),
                torch.cat([dw for *_, dw in parts]),
                shard.targets(x, 0.0, True),
            ]
        )
    for here, moved in zip(*answers, strict=True):
        torch.testing.assert_close(here, moved, rtol=1e-12, atol=1e-12)


# ---- the sample ---------------------------------------------------------------------------------


def test_the_sample_is_even_and_knows_no_shards() -> None:
    whole = sample(0, 5000, 0.3, seed=1, step=7)
    parts = [sample(a, b - a, 0.3, seed=1, step=7) + a for a, b in ((0, 1234), (1234, 5000))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sample(0, 9, 1.0, seed=1, step=7), torch.arange(9))
    assert sample(0, 9, 0.0, seed=1, step=7).numel() == 0
    times = torch.zeros(300)
    together = torch.zeros(300)  # how often with the next class: draws do not lean on each other
    for step in range(3000):
        taken = torch.zeros(300).index_fill(0, sample(0, 300, 0.25, seed=9, step=step), 1.0)
        times += taken
        together += taken * taken.roll(1)
    deviation = (times / 3000 - 0.25).abs().max() / (0.25 * 0.75 / 3000) ** 0.5
    pairs = (together / 3000 - 0.0625).abs().max() / (0.0625 * 0.9375 / 3000) ** 0.5
    assert deviation < 4.5 and pairs < 4.5
    with pytest.raises(ValueError, match="rate"):
        sample(0, 9, 1.1, seed=1, step=7)


# ---- who says no --------------------------------------------------------------------------------

BAD = [
    (dict(sample_rate=0.0), ValueError, "sample_rate"),
    (dict(scale=-1.0), ValueError, "scale"),
    (dict(optimizer="lion"), ValueError, "optimizer"),
    (dict(optimizer="sgd", optimizer_options=dict(beta=1)), TypeError, "beta"),
    (dict(update="step"), ValueError, "optimizer"),
    (dict(backend="reference"), ValueError, "margin_softmax"),
    (dict(gradient_scale="mean"), ValueError, "gradient_scale"),
    (dict(sub_centers=0), ValueError, "sub_centers"),
    (dict(storage="pinned"), ValueError, "pinned"),
    (dict(dtype=torch.int64), TypeError, "dtype"),
    (dict(batch_negatives=UNPG(), margin=class_losses.SFace()), ValueError, "batch_negatives"),
]


@pytest.mark.parametrize("options, kind, name", BAD, ids=[str(row[0]) for row in BAD])
def test_bad_options(options: dict[str, Any], kind: type[Exception], name: str) -> None:
    if options.get("storage") == "pinned" and torch.accelerator.is_available():
        pytest.skip("there is a GPU to read pinned memory")
    with pytest.raises(kind, match=name):
        head(**options)


def test_bad_batches() -> None:
    found = head()
    x, y = data()
    for given, kind, text in (
        ((x[:, :3], y), ValueError, r"embeddings: expected \[n, 6\]"),
        ((x.float(), y), TypeError, "float64"),
        ((x, y[:3]), ValueError, "labels"),
        ((x, y.float()), TypeError, "labels"),
        ((x, torch.full((N,), C)), IndexError, f"labels: .*{C}"),
        ((x, torch.full((N,), -1)), IndexError, "-1"),
    ):
        with pytest.raises(kind, match=text):
            found(*given)


@pytest.mark.parametrize("names", [("copies", "classes"), None])
@pytest.mark.parametrize("dim", [1, "classes"])
def test_a_dimension_of_a_mesh_by_number_or_name(
    names: tuple[str, str] | None, dim: int | str
) -> None:
    if names is None and dim == "classes":
        pytest.skip("a mesh without names has none to ask for")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        ranks = Ranks(None, mesh, dim)
        assert (ranks.world, ranks.rank) == (2, 1)
        part = ranks.device_mesh(torch.device("cpu"))
        assert part.ndim == 1 and part.mesh.tolist() == [0, 1]
    finally:
        dist.destroy_process_group()
