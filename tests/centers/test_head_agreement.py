"""A step is taken by all ranks or by none, whatever one of them alone has seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from class_center_cases import batch, head
from torch import Tensor

from fused_losses import class_losses, margins
from fused_losses.centers import ClassCenters
from fused_losses.centers.agreement import _reach, _shortest, outlook
from fused_losses.centers.engines import Gradients
from fused_losses.centers.step import SavedForward
from fused_losses.centers.update import RowUpdates

TINY = 2.0**-22  # length of a row in float16 whose gradient leaves that type


def made(update: str, nonfinite: str, **more: Any) -> ClassCenters:
    settings = dict(lr=0.1, momentum=0.9)
    return head(
        optimizer="sgd", optimizer_options=settings, update=update, nonfinite=nonfinite, **more
    )


def tables(found: ClassCenters) -> list[Tensor]:
    return [found.weight.clone(), *(t.clone() for t in found.row_states().values())]


def refused(found: ClassCenters, x: Tensor, y: Tensor, factor: float = 1.0) -> str:
    """What a step says; no row may have changed."""
    before, told = tables(found), "nothing"
    try:
        (found(x, y) * factor).backward()
        assert found.optimizer is not None
        found.optimizer.step()
    except (FloatingPointError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    found.optimizer.zero_grad()
    for a, b in zip(before, tables(found), strict=True):
        assert torch.equal(a, b)
    return told


def with_short_rows(found: ClassCenters, rank: int) -> ClassCenters:
    """On this rank alone a row is so short that its gradient is infinite in float16."""
    if found.ranks.rank == rank:
        with torch.no_grad():
            rows = found.weight
            rows[-1] = 0
            rows[-1, 0] = TINY
    return found


def wide(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x.detach().float().requires_grad_(), y


def one_rank_alone(rank: int, folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    last = dist.get_world_size() - 1
    for update in ("backward", "step"):
        for nonfinite in ("raise", "skip"):
            case = f"{update}, {nonfinite}"
            own = made(update, nonfinite)
            own(*batch(0)).backward()
            own.optimizer.step()
            bad = math.nan if rank == last else 1.0
            found[f"a gradient: {case}"] = refused(own, *batch(1), bad)
            if update == "step":
                own(*batch(2)).backward()
                own.scale_grad(bad)
                found[f"a factor: {case}"] = refused(own, *batch(3))
            assert own.skipped_steps == (nonfinite == "skip") * (1 + (update == "step"))
            short = with_short_rows(made(update, nonfinite, dtype=torch.float16), last)
            found[f"a sum over the batch: {case}"] = refused(short, *wide(1))
            own(*batch(4)).backward()  # and on
            own.optimizer.step()
            assert own.step_count == 2 and bool(own.weight.isfinite().all())
    counting = made("backward", "raise", every=2, sample_rate=0.4)
    for step in range(4):  # each rank the whole batch: the mean is that of one
        counting(*batch(step)).backward()
    found["rows"] = str(counting.step_count)
    torch.save(counting.weight, f"{folder}/{dist.get_world_size()}-{rank}.pt")
    factor = 1e6 if rank == last else 1.0
    found["a scaler's factor"] = refused(made("backward", "raise"), *batch(1), factor)
    return found


@pytest.mark.processes
def test_what_one_rank_sees_alone_stops_all_before_a_row_is_written(tmp_path: Path) -> None:
    for world in (1, 2):
        for rank, told in enumerate(processes.run(world, one_rank_alone, str(tmp_path))):
            assert told.pop("rows") == "2"
            for case, text in told.items():
                if case == "a scaler's factor":
                    own = rank == world - 1
                    expected = "at most 1024" if own else "rank 1 refused its backward"
                    assert text.startswith("RuntimeError") and expected in text
                elif "skip" in case:
                    assert text == "nothing", case
                else:
                    assert text.startswith("FloatingPointError: "), case
                    assert "no row was changed" in text
    whole = torch.load(tmp_path / "1-0.pt")
    parts = torch.cat([torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


# ---- the bound ----------------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "arcface": dict(margin=margins.ArcFace(0.5)),
    "not normalised": dict(margin=None, normalize=False),
    "bent": dict(margin=margins.MVSoftmax()),
    "smoothed": dict(label_smoothing=0.3),
    "sampled": dict(sample_rate=0.3, log_q=True),
    "sub-centres": dict(sub_centers=3),
    "sface": dict(margin=class_losses.SFace()),
    "sphereface2": dict(margin=class_losses.SphereFace2(0.3), sample_rate=0.5, log_q=True),
    "soft pooling": dict(margin=class_losses.SoftTriple(16.0), sub_centers=2),
    "several labels": dict(margin=class_losses.MLCD(16.0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_bound_on_a_rows_gradient_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every loss, and not so wide that an ordinary step were doubtful."""
    seen: list[tuple[float, float]] = []

    def watched(saved: SavedForward, grad: Gradients) -> Tensor:
        shortest = float(_shortest(saved)) if saved.normalize else 1.0
        longest = max(
            float(rows.norm(dim=-1).max())
            for _, rows in saved.gradients(grad, None, need_weight=True)
            if rows is not None
        )
        seen.append((longest, float(_reach(saved, grad)) / shortest))
        return outlook(saved, grad)

    monkeypatch.setattr("fused_losses.centers.update.outlook", watched)
    found = head(**LOSSES[name], optimizer="sgd")
    for step in range(4):
        found(*batch(step)).backward()
    for longest, bound in seen:
        assert 0 < longest <= bound < 1e4 * longest


def test_only_what_may_leave_its_type_is_swept_for_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept: list[float] = []
    real = RowUpdates._norm
    monkeypatch.setattr(
        RowUpdates, "_norm", lambda *given: (swept.append(real(*given)), swept[-1])[1]
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for update in ("backward", "step"):
            found = made(update, "raise", dtype=dtype)
            found(*wide(0)).backward()
            found.optimizer.step()
            assert not swept and bool(found.weight.isfinite().all())
    # short rows whose gradient float16 still holds: looked at, and stepped
    found = made("backward", "raise", dtype=torch.float16)
    with torch.no_grad():
        found.weight.mul_(0.02)
    before = found.weight.clone()
    found(*wide(0)).backward()
    assert len(swept) == 1 and math.isfinite(swept[0])
    assert found.step_count == 1 and not torch.equal(found.weight, before)
