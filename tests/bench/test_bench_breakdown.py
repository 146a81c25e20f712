"""Where samples stand, and that the parts of a step make the whole of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bench_breakdowns import shares

from fused_losses.bench import breakdown
from fused_losses.bench.breakdown import Sample
from fused_losses.bench.table import CASES

SCRIPT = """
 1234
\t           1de62 [unknown] (/usr/lib/libgomp.so.1)
\t    7ffdd9de8bc7 [unknown] ([unknown])

 1235
\tffffffff815e150d clear_page_erms ([kernel.kallsyms])
\tffffffff815e2644 exc_page_fault ([kernel.kallsyms])
\t           11721 forward (/x/_C.so)

 1235
\tffffffff815e150d unmap_page_range ([kernel.kallsyms])
\tffffffff815f27f7 __x64_sys_munmap ([kernel.kallsyms])

 1235
\tffffffff815e150d schedule ([kernel.kallsyms])

 1236
\t           20000 fused_losses::avx2::forward(int) (/x/_C.so)

 1236
\t          18f000 __memset_avx2_unaligned (/usr/lib/libc.so.6)

 1236
\t          18f000 _PyEval_EvalFrameDefault (/usr/bin/python3.11)
"""


def test_samples_are_told_apart() -> None:
    found = breakdown.parts_of(list(breakdown.parsed(SCRIPT)), None)
    assert found == {
        breakdown.SPINNING: 1, breakdown.FAULTS: 1, breakdown.UNMAPPED: 1, breakdown.SYSTEM: 1,
        breakdown.KERNELS: 1, breakdown.LIBC: 1, breakdown.OUTSIDE: 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("functions", "part"),
    [
        (
            ["_mm512_dpbf16_ps", "multiply_add", "multiply<Pairs, true>", "add_dw"],
            breakdown.PRODUCTS,
        ),
        # the store of a product's sums stands in a lambda within it
        (["operator()", "multiply<A<float>, B>", "forward"], breakdown.PRODUCTS),
        (["load", "exp", "fold_scores", "forward"], breakdown.EXPONENTIALS),
        (["fused_losses::avx2::exp(float)", "forward"], breakdown.EXPONENTIALS),
        (["transpose16<unsigned int>(unsigned int const*, long)", "turn_rows"], breakdown.PACKING),
        (["sum", "measure", "Tile"], breakdown.SCORES),
    ],
)
def test_a_place_in_the_kernels_has_one_part(functions: list[str], part: str) -> None:
    places = [(name, "/x/csrc/cpu/rows.h:1") for name in functions]
    assert breakdown.of_kernel(places) == part
    bound = [*places, ("run", "/x/csrc/bind/rows.cpp:1")]
    assert breakdown.of_kernel(bound) == breakdown.HELPERS


def test_names_are_bared() -> None:
    assert (
        breakdown.bare("void fused_losses::avx512::pack_rows<P, T<3>, R>(R&&, long)") == "pack_rows"
    )
    assert breakdown.bare("exp") == "exp" and breakdown.bare("a::b<c(d)>::e") == "e"


def test_without_perf_the_sum_is_told_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown.shutil, "which", lambda name: None)
    # long enough for ticks of the clock, by which the system tells user's time
    case = CASES["info_nce"].make(512, 64, rivals="none")
    found = breakdown.measured(
        "a", lambda: breakdown._step(case, case.ours[0]), 1e9, 100, (None, "no")
    )
    assert shares(found)[breakdown.USER] > 0 and found["samples"] == 0
    assert "perf is not installed" in found["parts"][0]["how"]


def test_a_perf_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuses = tmp_path / "perf"
    refuses.write_text("#!/bin/sh\necho No permission to sample. >&2\nexit 255\n")
    refuses.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ran: list[int] = []
    samples, why = breakdown.sampled(lambda: ran.append(1), tmp_path)
    assert samples == [] and ran == [1] and "No permission to sample." in why


def test_samples_make_shares_of_the_threads_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(run, folder: Path) -> tuple[list[Sample], str]:
        run()
        return list(breakdown.parsed(SCRIPT)), ""

    monkeypatch.setattr(breakdown, "sampled", sampled)
    case = CASES["info_nce"].make(64, 16, rivals="none")
    found = breakdown.measured(
        "a", lambda: breakdown._step(case, case.ours[0]), 1e9, 3, (None, "no")
    )
    told = shares(found)
    assert (
        told[breakdown.FAULTS] == pytest.approx(told[breakdown.KERNELS]) and found["samples"] == 7
    )
    ran = (part["of_what_ran"] for part in found["parts"])
    assert sum(share for share in ran if share is not None) == pytest.approx(1)
    assert any("no" in part["how"] for part in found["parts"] if part["name"] == breakdown.KERNELS)


def test_the_system_is_told_apart_without_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [s for s in breakdown.parsed(SCRIPT) if not s.frames[0][0] >> 63]
    monkeypatch.setattr(breakdown, "sampled", lambda run, folder: (run(), (mine, ""))[1])
    case = CASES["info_nce"].make(64, 16, rivals="none")
    found = breakdown.measured(
        "a", lambda: breakdown._step(case, case.ours[0]), 1e9, 3, (None, "no")
    )
    assert breakdown.SYSTEM in shares(found) and breakdown.FAULTS not in shares(found)
