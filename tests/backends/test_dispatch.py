"""Which backend runs, who decides, and what is said when it is not the one that was hoped for."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from conftest import require
from places import search_path

import fused_losses
from fused_losses import backends, functional
from fused_losses.backends import table
from fused_losses.functions import reference

X, W, LABELS = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
CPU = torch.device("cpu")


def chosen(backend: str | None = None) -> str:
    return backends.choose(backend, CPU, torch.float32, "fp32")[0]


@pytest.fixture
def without_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine as if the extension had not been built."""
    known = backends.unavailable

    def unavailable(name: str) -> str | None:
        return "the C++ extension is not built (a test says so)" if name == "cpu" else known(name)

    monkeypatch.setattr(backends, "unavailable", unavailable)
    monkeypatch.setattr(backends, "_warned", set())
    yield


def test_available_names_every_backend_with_a_reason() -> None:
    told = backends.available()
    assert set(told) == {"reference", "cpu", "triton", "cuda", "bounded"}
    assert told["reference"] == told["bounded"] == "ok"
    assert all(told.values())
    # a bare word would not say what to do about it
    assert all(state == "ok" or " " in state for state in told.values())


def test_every_operation_has_an_order_on_a_gpu() -> None:
    for operation in table.OPERATIONS:
        for width in (1, 256, 4096):
            order = table.order(operation, "cuda", width)
            assert set(order) <= set(backends.NAMES) and order[-1] == "bounded"
        assert table.order(operation, "mps") == ("bounded",)
    starts = [e for e in table.ON_GPU if e.least_width == 0]
    assert len(starts) == len(table.OPERATIONS)
    assert all(e.why for e in table.ON_GPU)


def test_auto_takes_the_compiled_kernels() -> None:
    require("cpu")
    assert chosen() == chosen("auto") == "cpu"


def test_use_backend_nests_and_ends_with_its_block() -> None:
    before = chosen()
    with fused_losses.use_backend("reference"):
        assert chosen() == "reference"
        with fused_losses.use_backend("bounded"):
            assert chosen() == "bounded"
            assert chosen("reference") == "reference"  # the argument wins
        assert chosen() == "reference"
        with pytest.raises(KeyError), fused_losses.use_backend("bounded"):
            raise KeyError
        assert chosen() == "reference"
    assert chosen() == before


def test_use_backend_reaches_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    known = reference.margin_softmax
    monkeypatch.setattr(
        reference,
        "margin_softmax",
        lambda *args, **options: ran.append(1) or known(*args, **options),
    )
    with fused_losses.use_backend("reference"):
        fused_losses.margin_softmax(X, W, LABELS)
        fused_losses.linear_cross_entropy(X, W, LABELS)
    fused_losses.margin_softmax(X, W, LABELS, backend="bounded")
    assert len(ran) == 2


def test_unknown_names_are_refused() -> None:
    words = "backend: expected auto, reference, cpu, triton, cuda, bounded, got 'fast'"
    with pytest.raises(ValueError, match=words), fused_losses.use_backend("fast"):
        pass
    with pytest.raises(ValueError, match=words):
        fused_losses.row_statistics(X, W, LABELS, backend="fast")


@pytest.mark.usefixtures("without_cpu")
def test_auto_without_the_extension_is_bounded_with_one_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = fused_losses.margin_softmax(X, W, LABELS)
        fused_losses.margin_softmax(X, W, LABELS)
        fused_losses.linear_cross_entropy(X, W, LABELS)
    told = [str(w.message) for w in caught if "fused_losses" in str(w.message)]
    assert told == [
        "fused_losses runs on its bounded path (cpu: the C++ extension is not built (a test says "
        "so))"
    ]
    assert torch.equal(first, fused_losses.margin_softmax(X, W, LABELS, backend="bounded"))


def test_naming_a_backend_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_losses.margin_softmax(X, W, LABELS, backend="bounded")


def child(program: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: what is read from the environment, or at import, is seen only there."""
    known = {k: v for k, v in os.environ.items() if k != "FUSED_LOSSES_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**known, "PYTHONPATH": search_path(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


CHOOSE = (
    "import torch, fused_losses.backends as b;"
    "c = lambda n=None: b.choose(n, torch.device('cpu'), torch.float32, 'fp32')[0];"
)


@pytest.mark.processes
def test_environment_names_the_backend_and_yields_to_the_program() -> None:
    told = child(
        CHOOSE + "print(c(), c('bounded'));\nwith b.use_backend('bounded'): print(c())",
        FUSED_LOSSES_BACKEND="reference",
    )
    assert told.stdout.split() == ["reference", "bounded", "bounded"], told.stderr


@pytest.mark.processes
def test_environment_with_an_unknown_name_is_refused() -> None:
    told = child(CHOOSE + "c()", FUSED_LOSSES_BACKEND="quick")
    assert told.returncode != 0
    assert "backend: expected auto" in told.stderr and "'quick'" in told.stderr


@pytest.mark.processes
def test_import_is_quiet_and_starts_nothing() -> None:
    # torch._dynamo alone is seconds of import, and brings Triton
    told = child(
        "import sys, warnings; warnings.simplefilter('error'); import fused_losses;"
        "print([m for m in ('triton', 'torch._dynamo', 'matplotlib') if m in sys.modules])"
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "[]" and told.stderr == ""


# --- explain --------------------------------------------------------------------------------------


def test_explain_names_the_backend_and_runs_nothing() -> None:
    plan = fused_losses.explain(fused_losses.margin_softmax, X, W, LABELS, backend="bounded")
    assert plan.backend == "bounded" and plan.reasons == {} and plan.peak_extra_bytes > 0
    assert "bounded" in str(plan)
    # labels out of range are the call's affair
    with fused_losses.use_backend("reference"):
        for function in (fused_losses.margin_softmax, fused_losses.linear_cross_entropy):
            assert fused_losses.explain(function, X, W, LABELS + 100).backend == "reference"


@pytest.mark.usefixtures("without_cpu")
def test_explain_says_why_a_backend_was_passed_over() -> None:
    plan = fused_losses.explain(fused_losses.margin_softmax, X, W, LABELS)
    assert plan.backend == "bounded"
    assert plan.reasons == {"cpu": ["the C++ extension is not built (a test says so)"]}
    assert "not built" in str(plan)


def test_explain_refuses_what_the_call_would() -> None:
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run this call"):
        fused_losses.explain(
            fused_losses.margin_softmax, X.double(), W.double(), LABELS, backend="cuda"
        )
    with pytest.raises(ValueError, match=r"weight: expected \[C, 3\]"):
        fused_losses.explain(fused_losses.margin_softmax, X, W[:, :2], LABELS)


def test_explain_refuses_what_depends_on_values() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())

    words = "fn: expected work that depends on shapes alone, but scaled reads the values"
    with pytest.raises(ValueError, match=words):
        fused_losses.explain(scaled, X)


def test_explain_of_a_loss_of_ones_own() -> None:
    """Its own tensors and our ops' workspaces, forward and backward; inputs' gradients are not."""
    x = torch.empty(500, 64, requires_grad=True)

    def squares(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T).square().sum()

    def both(x: torch.Tensor) -> torch.Tensor:
        return squares(x) + functional.info_nce(x, x, backend="bounded")

    alone = fused_losses.explain(functional.info_nce, x, x, backend="bounded").peak_extra_bytes
    own = fused_losses.explain(squares, x).peak_extra_bytes
    # the product, its square, and the gradient of the product, of two
    assert 2 * 4 * 500**2 <= own <= 5 * 4 * 500**2
    plan = fused_losses.explain(both, x)
    assert plan.backend == "bounded" and max(alone, own) <= plan.peak_extra_bytes <= alone + own
    forward = fused_losses.explain(squares, x.detach()).peak_extra_bytes
    assert forward < own


def test_explain_takes_the_arguments_by_name() -> None:
    by_name = {"embeddings": X, "weight": W, "labels": LABELS, "backend": "bounded"}
    by_place = fused_losses.explain(fused_losses.margin_softmax, X, W, LABELS, backend="bounded")
    assert fused_losses.explain(fused_losses.margin_softmax, **by_name) == by_place


def test_explain_counts_the_scores_of_the_reference_alone() -> None:
    def extra(backend: str, classes: int) -> int:
        weight = torch.empty(classes, 3)
        return fused_losses.explain(
            fused_losses.margin_softmax, X, weight, LABELS, backend=backend
        ).peak_extra_bytes

    assert extra("reference", 2_000_000) - extra("reference", 1_000_000) > 4 * 4 * 1_000_000
    assert extra("bounded", 2_000_000) == extra("bounded", 1_000_000)


def test_explain_counts_the_pairs_of_the_reference_alone() -> None:
    def extra(backend: str, rows: int) -> int:
        x = torch.empty(rows, 3)
        return fused_losses.explain(
            functional.info_nce, x, x.clone(), backend=backend
        ).peak_extra_bytes

    assert extra("reference", 20_000) - extra("reference", 10_000) > 4 * 3 * 10_000**2
    assert extra("bounded", 20_000) - extra("bounded", 10_000) < 10_000 * 2_000
