"""The dispatch table as it is meant, word by word, and what chooses by it: no kernel runs here.

What a fault in the table or in a choice changes is seen here first: `dispatch_mutants.py`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fused_losses
from fused_losses import backends
from fused_losses.backends import table
from fused_losses.primitives.distances import op as distances
from fused_losses.primitives.distances.inputs import KINDS, PRODUCTS
from fused_losses.primitives.pairs import op as pairs
from fused_losses.primitives.pairs.inputs import PairInputs
from fused_losses.primitives.row_update import op as row_update
from fused_losses.primitives.topk import op as topk
from fused_losses.primitives.topk.inputs import MOST, TopkInputs

CPU, GPU, ELSEWHERE = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
TRITON = ("triton", "cuda", "bounded")
CUDA = ("cuda", "triton", "bounded")
# operation: what comes first, and of 16-bit rows from which width on the other one does
ORDERS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "row_statistics": (TRITON, 2048),
    "class_rules": (TRITON, None),
    "pairs": (TRITON, 1024),
    "maxsim": (TRITON, None),
    "distance_products": (TRITON, None),
    "distance_sums": (("cuda", "bounded"), None),
    "topk": (TRITON, 1024),
    "rows": (CUDA, None),
    "divergence": (TRITON, None),
    "row_update": (("cuda", "bounded"), None),
}


class Machine:
    """What can run, by name; all others say why they cannot."""

    def __init__(self, *able: str) -> None:
        self.able, self.asked = able, []

    def __call__(self, name: str, *call: Any) -> list[str]:
        self.asked.append((name, *call))
        return [] if name in self.able else [f"no {name} here", "nor there"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    out = Machine(*backends.NAMES)
    monkeypatch.setattr(backends, "reasons_against", out)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)
    yield out


def test_the_table_is_what_it_is_meant_to_be() -> None:
    assert (*ORDERS,) == table.OPERATIONS
    for operation, (order, wide) in ORDERS.items():
        widths = (0, 1, 512, 1023, 1024, 2047, 2048, 10**6)
        for width in widths:
            assert table.order(operation, "cuda", width) == order
            assert table.order(operation, "cuda", width, False) == order
            wanted = CUDA if wide is not None and width >= wide else order
            assert table.order(operation, "cuda", width, True) == wanted, (operation, width)
            assert table.order(operation, "cpu", width, True) == ("cpu", "bounded")
            assert table.order(operation, "xpu", width, True) == ("bounded",)
        assert table.order(operation, "cuda", half=True) == order


def test_names_are_in_one_order_everywhere() -> None:
    assert backends.NAMES == ("reference", "cpu", "triton", "cuda", "bounded")
    assert list(backends.available()) == [*backends.NAMES]
    for name in ("auto", *backends.NAMES):
        assert backends.check_name(name) == name


def test_available_has_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends, "unavailable", lambda name: "a reason" if name == "cuda" else None
    )
    told = backends.available()
    assert told.pop("cuda") == "a reason" and set(told.values()) == {"ok"}
    # Dynamo asks while it traces, and does not trace what asks
    assert vars(backends.reasons_against)["_dynamo_marked_constant"] is True
    # nor is what cannot run at all asked about the call
    assert backends.reasons_against("cuda", CPU, torch.float32, "nonsense") == ["a reason"]


# ---- choose -------------------------------------------------------------------------------------


def test_the_first_that_has_no_reason_runs(machine: Machine) -> None:
    for able, name in ((("triton", "cuda"), "triton"), (("cuda",), "cuda"), ((), "bounded")):
        machine.able, machine.asked = (*able, "bounded"), []
        with backends.watched() as choices:
            chosen, refused = backends.choose(None, GPU, torch.float32, "fp32", "pairs", 64)
        assert chosen == name and choices == [(name, refused)]
        passed_by = TRITON[: TRITON.index(name)]
        assert refused == {each: [f"no {each} here", "nor there"] for each in passed_by}
        # and none behind it is asked
        call = (GPU, torch.float32, "fp32")
        assert machine.asked == [(each, *call) for each in (*passed_by, name)]


def test_an_operation_a_width_and_a_dtype_reach_the_table(machine: Machine) -> None:
    def first(*call: Any) -> str:
        return backends.choose("auto", GPU, *call)[0]

    assert first(torch.bfloat16, "fp32", "pairs", 1024) == "cuda"
    assert first(torch.float16, "bf16", "pairs", 1023) == "triton"
    assert first(torch.float32, "fp32", "pairs", 4096) == "triton"
    assert first(torch.float32, "fp32", "rows") == "cuda"
    # row statistics of no width are what is not said
    assert first(torch.bfloat16, "fp32") == "triton"
    assert backends.choose(None, GPU, torch.bfloat16, "fp32", width=2048)[0] == "cuda"


def test_a_named_backend_runs_or_says_all_reasons(machine: Machine) -> None:
    assert backends.choose("cuda", CPU, torch.float32, "fp32", "pairs") == ("cuda", {})
    machine.able, machine.asked = ("bounded",), []
    words = (
        r"^backend='cuda' cannot run this call \(device cuda:0, torch.float16, precision='tf32'\): "
        r"cuda: no cuda here, nor there. fused_losses.backends.available\(\) lists what can run"
    )
    with pytest.raises(RuntimeError, match=words):
        backends.choose("cuda", GPU, torch.float16, "tf32", "pairs")
    assert machine.asked == [("cuda", GPU, torch.float16, "tf32")]
    machine.able = ()
    words = "backend='auto' cannot .*: triton: no triton here, nor there; cuda: .*; bounded: no bou"
    with pytest.raises(RuntimeError, match=words):
        backends.choose(None, GPU, torch.float32, "fp32", "pairs")


def warned(*calls: tuple) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            backends.choose(*call)
    return [str(each.message) for each in caught]


def test_what_is_passed_over_is_said_once_and_only_by_auto(machine: Machine) -> None:
    auto = (None, GPU, torch.float32, "fp32", "pairs")
    assert warned(auto, auto) == []  # the first runs
    machine.able = ("cuda", "bounded")
    told = ["fused_losses runs on its cuda path (triton: no triton here, nor there)"]
    assert warned(("cuda", *auto[1:])) == []
    with backends.watched() as choices:
        assert warned(auto, auto) == []
    assert [name for name, _ in choices] == ["cuda", "cuda"]
    assert warned(auto, auto) == told
    assert warned(auto) == []
    # of another path once more
    machine.able = ("bounded",)
    assert warned(auto, auto) == [
        "fused_losses runs on its bounded path (triton: no triton here, nor there; "
        "cuda: no cuda here, nor there)"
    ]


def test_the_warning_names_who_asked(machine: Machine) -> None:
    machine.able = ("bounded",)

    def a_primitive() -> None:
        backends.choose(None, GPU, torch.float32, "fp32", "pairs")

    def a_function() -> None:
        a_primitive()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        a_function()
    (found,) = caught
    assert found.filename == __file__
    assert found.lineno == a_function.__code__.co_firstlineno + 1


def test_watchers_nest_and_end(machine: Machine) -> None:
    call = (None, CPU, torch.float32, "fp32")
    with backends.watched() as outer:
        backends.choose(*call)
        with backends.watched() as inner:
            backends.choose("bounded", *call[1:])
        backends.choose("reference", *call[1:])
        with pytest.raises(KeyError), backends.watched():
            raise KeyError
        backends.choose(*call)
    backends.choose(*call)
    assert [name for name, _ in inner] == ["bounded"]
    assert [name for name, _ in outer] == ["cpu", "reference", "cpu"]


# ---- who is asked for ---------------------------------------------------------------------------


def test_argument_block_environment_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)
    assert backends.requested(None) == "auto"
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "triton")
    assert backends.requested(None) == "triton" and backends.requested("cpu") == "cpu"
    with fused_losses.use_backend("bounded"):
        assert backends.requested(None) == "bounded" and backends.requested("cpu") == "cpu"
        with fused_losses.use_backend("auto"):
            assert backends.requested(None) == "auto"
    assert backends.requested(None) == "triton"
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        backends.requested(None)


PLAIN = (torch.device("cpu"), torch.float32, "fp32")


def test_who_asks_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)
    assert backends.unasked(None) and not backends.unasked("auto")
    with fused_losses.use_backend("cpu"):
        assert not backends.unasked(None)
    with backends.watched():
        assert not backends.unasked(None)
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "bounded")
    assert not backends.unasked(None)
    rows = torch.zeros(2, 3)
    with backends.watched() as choices:
        fused_losses.info_nce(rows, rows)
    assert [name for name, _ in choices] == ["bounded"]
    monkeypatch.delenv("FUSED_LOSSES_BACKEND")
    with backends.watched() as choices:
        fused_losses.info_nce(rows, rows)
    assert [name for name, _ in choices] == [backends.choose(None, *PLAIN)[0]]
    assert backends.unasked(None)


def test_a_block_is_its_threads_and_compiled_code_sees_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FUSED_LOSSES_BACKEND", raising=False)

    def elsewhere() -> str:
        found = []
        thread = threading.Thread(target=lambda: found.append(backends.requested(None)))
        thread.start()
        thread.join()
        return found[0]

    with fused_losses.use_backend("reference"):
        assert elsewhere() == "auto"
        with monkeypatch.context() as traced:
            traced.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
            assert elsewhere() == "reference"
            assert backends.requested(None) == "reference"
            with fused_losses.use_backend("bounded"):
                assert backends.requested(None) == "bounded"
            assert backends.requested(None) == "reference"
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert backends.requested(None) == "auto"


def test_nothing_is_said_while_code_is_traced(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.able = ("bounded",)
    auto = (None, GPU, torch.float32, "fp32", "pairs")
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_compiling", lambda: True)
        assert warned(auto) == []
    assert len(warned(auto)) == 1


# ---- primitives that not every backend has whole ------------------------------------------------


def test_kinds_that_a_backend_lacks(machine: Machine) -> None:
    def choose(name: str | None, kind: str, precision: str = "fp32", where: Any = GPU) -> str:
        return distances.choose(name, where, torch.float32, precision, kind)[0]

    for kind in KINDS:
        product = kind in PRODUCTS
        assert distances.operation_of(kind) == ("distance_products" if product else "distance_sums")
        assert choose(None, kind) == ("triton" if product else "cuda")
        for name in ("reference", "cpu", "cuda", "bounded"):
            assert choose(name, kind) == name
        if product:
            assert choose("triton", kind) == "triton"
        else:
            words = f"backend='triton' cannot run kind '{kind}': its kernels have "
            with pytest.raises(RuntimeError, match=words):
                choose("triton", kind)
        # sums of coordinates have no products whose precision there is to choose
        machine.asked = []
        choose("cpu", kind, "bf16")
        assert machine.asked[0][3] == ("bf16" if product else "fp32")


def test_powers_of_distances_have_two_paths(machine: Machine) -> None:
    def choose(name: str | None, score: str) -> str:
        rows = torch.zeros(3, 2048, dtype=torch.bfloat16)
        given = dict.fromkeys(PairInputs._fields) | {"x": rows, "precision": "fp32"}
        return pairs._backend(PairInputs(**(given | {"score": score})), name)

    for name in ("bounded", "reference"):
        assert choose(name, "power") == choose(name, "dot") == name
    assert choose(None, "power") == choose("auto", "power") == "bounded"
    assert choose(None, "dot") == "cpu"
    for name in ("cpu", "triton", "cuda"):
        assert choose(name, "dot") == name
        words = (
            f"backend='{name}' cannot run powers of distances: its kernels have no logarithm of a "
            "score; use backend='auto', which takes 'bounded', or one of bounded, reference"
        )
        with pytest.raises(RuntimeError, match=words):
            choose(name, "power")
    assert machine.asked[-1] == ("cuda", CPU, torch.bfloat16, "fp32")


class Ran(Exception):
    """Who would have run."""


def test_rows_are_updated_by_what_has_the_rule(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(name: str | None, rule: str, key: int | None = None, where: Any = CPU) -> str:
        step = {"rule": rule, "rounding_key": key, "weight": torch.zeros(2, 3, device=where)}
        asked = []

        def chooses(*call: Any) -> Any:
            asked.extend(call)
            raise Ran

        monkeypatch.setattr(backends, "choose", chooses)
        with pytest.raises(Ran):
            row_update._run(type("Step", (), step)(), name)
        assert asked[1:] == [torch.device(where), torch.float32, "fp32", "row_update", 3]
        return asked[0]

    for rule in ("sgd", "adamw", "adagrad"):
        for name in ("auto", "cpu", "bounded", "reference"):
            assert choose(name, rule) == choose(name, rule, 7) == name
        with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: rows are "):
            choose("triton", rule)
        # what no CUDA kernel has, another path takes
        has = rule != "adagrad"
        assert choose(None, rule, where=ELSEWHERE) == ("auto" if has else "bounded")
        assert choose(None, rule, 7, ELSEWHERE) == "bounded"
        words = "no CUDA kernel has " + ("stochastic rounding" if has else "adagrad_rows_")
        with pytest.raises(RuntimeError, match=words):
            choose("cuda", rule, 7)
    assert choose("cuda", "sgd") == choose("cuda", "adamw") == "cuda"
    with pytest.raises(RuntimeError, match="no CUDA kernel has adagrad_rows_"):
        choose("cuda", "adagrad")


def test_a_long_list_of_neighbours_is_for_those_that_hold_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(topk, "PAIR_TOPK", lambda name, *given: ran.append(name) or name)

    def choose(name: str | None, k: int, able: str = "cuda", **further: Any) -> str:
        machine.able, machine.asked = (able, "bounded", "reference"), []
        rows = torch.zeros(2, 4, dtype=further.pop("dtype", torch.float32))
        given = dict.fromkeys(TopkInputs._fields) | {"x": rows, "y": rows, "k": k} | further
        with backends.watched():  # nobody is warned
            return topk.select(TopkInputs(**given), name)

    monkeypatch.setattr(table, "ON_CPU", CUDA)
    for able in ("cuda", "triton"):
        assert choose(None, MOST, able) == choose(able, MOST, able) == able
        assert choose(None, MOST + 1, able) == "bounded"
        with pytest.raises(RuntimeError, match=f"backend='{able}' .* hold k <= {MOST}, got k=2049"):
            choose(able, MOST + 1, able)
    assert choose("bounded", MOST + 1) == "bounded"
    # a narrow screen of float64 rows has the narrow rows' kernels
    choose(None, 1, screen="bf16", dtype=torch.float64)
    assert machine.asked[0] == ("cuda", CPU, torch.float32, "bf16")
    choose(None, 1, dtype=torch.float16)
    assert machine.asked[0] == ("cuda", CPU, torch.float16, "fp32")
    before = len(ran)
    monkeypatch.setattr(
        backends, "module", lambda *names: type("Form", (), {"select": lambda _: names})
    )
    assert choose("reference", 3) == ("topk", "reference") and len(ran) == before


def test_the_screen_of_a_cpu_that_has_narrow_products(machine: Machine) -> None:
    rows = torch.zeros(2, 3, dtype=torch.float64)
    for able, name, screen in (
        ("cpu", None, "bf16"),
        ("cpu", "cpu", "bf16"),
        ("cpu", "bounded", "fp32"),
        ("bounded", None, "fp32"),
    ):
        machine.able, machine.asked = (able,), []
        assert topk.best_screen(rows, name) == screen
        assert machine.asked == [("cpu", CPU, torch.float32, "bf16")]
