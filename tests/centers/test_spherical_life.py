"""An exact head in the life of a module: copied, cast, loaded, frozen, scaled, refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from spherical_cases import ALL, C, D, N, batch, dense, head_of
from torch import Tensor

import fused_losses
from fused_losses import SphericalHead
from fused_losses.centers import factored


def trained(head: SphericalHead, steps: int = 3) -> Tensor:
    """The rows after some steps that depend on their number alone."""
    torch.manual_seed(5)
    for _ in range(steps):
        h, labels = batch()
        head(h, labels).backward()
        head.optimizer.step()
    return head.rows(ALL)


def through_file(head: SphericalHead) -> SphericalHead:
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state(head: SphericalHead) -> SphericalHead:
    file = io.BytesIO()
    torch.save({"head": head.state_dict(), "sgd": head.optimizer.state_dict()}, file)
    file.seek(0)
    state, new = torch.load(file), SphericalHead(C, D, lr=1.0, dtype=torch.float64, seed=4)
    new.load_state_dict(state["head"])
    new.optimizer.load_state_dict(state["sgd"])
    return new


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head)), through_file, by_state],
    ids=["deepcopy", "pickle", "save", "state_dict"],
)
def test_copies_go_on_alike_and_apart(copied: object) -> None:
    head = head_of("z")
    trained(head)
    h, labels = batch()
    head(h, labels).backward()  # waits, and is no part of a copy
    new = copied(head)  # type: ignore[operator]
    assert new.grad_norm() == 0
    head.zero_grad()
    assert "trains" not in head.state_dict()
    before = head.rows(ALL)
    torch.testing.assert_close(trained(new), trained(copy.deepcopy(head)), rtol=0, atol=0)
    assert torch.equal(head.rows(ALL), before)
    assert int(new.get_extra_state()) == 6


def test_casts_keep_the_matrices_and_measure_again() -> None:
    head = head_of("z")
    trained(head)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        head.to(dtype)
        assert head.table.rows.dtype == dtype
        assert {head.table.get_buffer(name).dtype for name in factored.MATRICES} == {torch.float64}
        assert head.drift() < 1e-14
        h, labels = batch()
        want = dense("z", head.table.of(ALL), h, labels)
        torch.testing.assert_close(head(h, labels), want, rtol=1e-11, atol=0)
        head(h, labels).backward()
        head.optimizer.step()


def test_rows_alone_are_loaded_with_matrices_of_their_own() -> None:
    head, other = head_of("z"), head_of("z", seed=3)
    trained(head)
    trained(other)
    rows = torch.randn(C, D, dtype=torch.float64)
    found = head.load_state_dict({"table.rows": rows}, strict=False)
    assert len(found.missing_keys) == 5
    assert torch.equal(head.rows(ALL), rows)
    assert head.drift() < 1e-14
    with pytest.raises(RuntimeError, match="size mismatch"):
        head.load_state_dict(SphericalHead(C + 1, D, lr=0.1).state_dict())


def test_what_does_not_train() -> None:
    head = head_of("z")
    before = head.rows(ALL)
    h, labels = batch()
    torch.autograd.grad(head(h, labels), h)
    with torch.no_grad():
        head(h, labels)
    head.eval()
    head(h, labels).backward()
    head.train().requires_grad_(False)
    head(h, labels).backward()
    assert h.grad is not None
    assert h.grad.abs().max() > 0
    head.requires_grad_(True)
    head(h, labels).backward()
    head.zero_grad()
    head.optimizer.step()
    assert torch.equal(head.rows(ALL), before)
    assert next(iter(head.parameters())).numel() == 0


def test_a_forward_does_not_outlive_its_table() -> None:
    head = head_of("z")
    h, labels = batch()
    late = head(h, labels)
    head(h, labels).backward()
    head.optimizer.step()
    with pytest.raises(RuntimeError, match="updated, moved or loaded after this forward"):
        late.backward()
    head(h, labels).backward()
    head.fill_(torch.randn(C, D))
    with pytest.raises(RuntimeError, match="zero_grad"):
        head.optimizer.step()
    head.zero_grad()
    head.optimizer.step()


def test_numbers_that_are_not_finite_change_no_row() -> None:
    head = head_of("z")
    before = head.rows(ALL)
    h, labels = batch()
    poisoned = h.detach().clone().index_fill_(0, torch.tensor([2]), torch.nan).requires_grad_()
    head(poisoned, labels).backward()
    with pytest.raises(FloatingPointError, match="no row was changed"):
        head.optimizer.step()
    assert torch.equal(head.rows(ALL), before)
    # an ignored row may hold anything
    labels[2] = -100
    head(poisoned, labels).backward()
    head.optimizer.step()
    assert poisoned.grad is not None
    assert not torch.equal(head.rows(ALL), before)
    assert head.rows(ALL).isfinite().all()


def test_grad_scaler_and_schedule() -> None:
    head, plain = head_of("z"), head_of("z")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    schedule = torch.optim.lr_scheduler.StepLR(head.optimizer, 1, gamma=0.5)
    h, labels = batch()
    for step in range(3):
        scaler.scale(head(h, labels)).backward()
        scaler.step(head.optimizer)
        scaler.update()
        head.optimizer.zero_grad()
        plain.optimizer.param_groups[0]["lr"] = 0.3 * 0.5**step
        plain(h, labels).backward()
        plain.optimizer.step()
        schedule.step()
    torch.testing.assert_close(head.rows(ALL), plain.rows(ALL), rtol=1e-12, atol=0)
    before = head.rows(ALL)
    scaler.scale(head(h * torch.inf, labels)).backward()
    scaler.step(head.optimizer)  # finds it, and steps not
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert torch.equal(head.rows(ALL), before)


def test_positions_autocast_and_empty_batches() -> None:
    head = head_of("taylor", torch.float32)
    h, labels = torch.randn(6, D, requires_grad=True), torch.randint(0, C, (6,))
    want = head(h, labels)
    torch.testing.assert_close(head(h.view(2, 3, D), labels.view(2, 3)), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(h.bfloat16(), labels).dtype == torch.float32
        torch.testing.assert_close(head(h, labels), want)
    assert head(h[:0], labels[:0]) == 0
    nothing = head(h, torch.full((6,), -100))
    nothing.backward()
    assert nothing == 0
    head.optimizer.step()
    assert h.grad is not None
    assert h.grad.abs().max() == 0


def test_equal_outputs_have_a_deviation_of_zero() -> None:
    head = head_of("z").fill_(torch.ones(C, D, dtype=torch.float64))
    h, labels = batch()
    loss = head(h, labels)
    loss.backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()
    assert loss.isfinite()


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of("z")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="expected one process, got 2"):
        head(*batch())
    head.eval()(*batch())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0, 4), {}, ValueError, "num_classes: expected at least 1"),
        ((4, 4, "ce"), {}, ValueError, "loss: expected one of z, mse, taylor"),
        ((4, 4), {"lr": 0}, ValueError, "lr: expected"),
        ((4, 4), {"weight_decay": -1}, ValueError, "weight_decay: expected"),
        ((4, 4), {"a": 0}, ValueError, "a: expected"),
        ((4, 4), {"reduction": "none"}, ValueError, "reduction: expected"),
        ((4, 4), {"max_condition": 0.5}, ValueError, "max_condition: expected"),
        ((4, 4), {"dtype": torch.int32}, TypeError, "dtype: expected"),
    ],
)
def test_bad_constructions(
    arguments: tuple, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        SphericalHead(*arguments, **{"lr": 0.1, **options})


def test_bad_calls() -> None:
    head, (h, labels) = head_of("z"), batch()
    for bad_h, bad_labels, error, words in (
        (h[:, :3], labels, ValueError, rf"embeddings: expected \[n, {D}\]"),
        (torch.randn(N, C), labels, ValueError, r"SphericalHead\(num_classes, embedding_dim\)"),
        (h, labels[:3], ValueError, "labels: expected"),
        (h, labels.double(), TypeError, "labels: expected"),
        (h, labels + C, IndexError, "labels: expected"),
        (h.view(2, 6, D), labels, ValueError, r"labels: expected shape \(2, 6\)"),
        (h[0], labels, ValueError, "embeddings: expected"),
    ):
        with pytest.raises(error, match=words):
            head(bad_h, bad_labels)
    with pytest.raises(IndexError, match="ids: expected"):
        head.rows(torch.tensor([C]))
    with pytest.raises(ValueError, match="weight: expected shape"):
        head.fill_(torch.zeros(C, D + 1))
    with pytest.raises(ValueError, match="k: expected"):
        head.top_classes(h, C + 1)
    assert fused_losses.SphericalHead is SphericalHead


def test_compiled_steps_are_the_same() -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        head = head_of("z")
        call = torch.compile(lambda x, y, head=head: head(2 * x, y), backend="aot_eager")
        torch.manual_seed(3)
        for _ in range(2):
            h, labels = batch()
            (call if compiled else lambda x, y, head=head: head(2 * x, y))(h, labels).backward()
            head.optimizer.step()
            head.optimizer.zero_grad()
        found.append((head.rows(ALL), h.grad))
    for got, want in zip(*found, strict=True):
        # compiled code has PyTorch's formulas where plain code has the extension's
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
