"""The calls whose Triton kernels are compiled: every operation of the dispatch table that has some.

Between them they take every entry of every tile table (test_gpu_static.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tools.gpu_static.host_calls import (
    BF16,
    FP16,
    FP32,
    class_rules,
    distances,
    divergence,
    maxsim,
    pairs,
    row_statistics,
    target_loss,
    topk,
    unit_rows,
)
from tools.gpu_static.record import AMD, NVIDIA, SIZES, Compilation, launches


@dataclass(frozen=True)
class HostCall:
    """One call of an operation; `make gpu-gate` draws on it for the targets of `tested`."""

    run: Callable[..., None]
    options: dict[str, Any]
    tested: tuple[str, ...]

    @property
    def operation(self) -> str:
        return self.run.__name__

    @property
    def aligned(self) -> bool:
        """Rows of operands and outputs are whole vectors."""
        sizes = (self.options.get(name, 0) for name in ("d", "n", "m", "attention"))
        return all(size % 16 == 0 for size in sizes)

    def steps(self, **changes: Any) -> Callable[[], None]:
        return partial(self.run, **(self.options | changes))


MAIN = ("sm_80", "sm_90", "sm_100")
ALSO = MAIN + AMD
MASKS = dict(biases=True, ids=True, groups=True, windows=True, root=True, reach=1.0)
TWO = dict(**MASKS, cols=True, exclude=3, skip_self=True)
ATTEND = dict(attention=512, exclude=3, skip_self=True, **MASKS)
# of pairs apart, whose scores have no biases
APART = dict(apart=True, labels=True, ids=True, groups=True, windows=True, root=True, reach=1.0)
APART_TWO = dict(**APART, cols=True, exclude=3, skip_self=True)
APART_ATTEND = dict(**APART, attention=512, exclude=3, skip_self=True)
CHOSEN = dict(everything=True, match="different", center=True)
FULL = dict(extra=True, classes=100_000)
JENSEN, VARIATION, BERNOULLI = "jensen_shannon", "total_variation", "bernoulli_norm"
BENT = dict(bent=True, **FULL)
LABELS = dict(many=4, classes=100_000)
CENTERS = dict(centers=3, **LABELS)
SOFT = dict(softness=0.1, **CENTERS)
ODD = dict(n=4095, m=8191)  # rows of the output that are not whole vectors
ONE_QUERY = (1, 32, 1000, 256)
TF32 = dict(dtype=FP32, precision="tf32")
MIXED = dict(dtype=FP32, precision="mixed")
ROUNDED = dict(dtype=FP32, precision="bf16")
HALF, WIDE = dict(dtype=BF16), dict(dtype=FP32)


def _call(run: Callable[..., None], *tested: str, **options: Any) -> HostCall:
    return HostCall(run, options, tested)


CALLS: dict[str, HostCall] = {
    "unit_rows bf16": _call(unit_rows, *ALSO, d=512, **HALF),
    "unit_rows fp32": _call(unit_rows, *ALSO, d=100, **WIDE),
    "unit_rows fp16, long": _call(unit_rows, d=1100, dtype=FP16),
    "target_loss": _call(target_loss, *ALSO, beyond_pi=None, mean=False),
    "target_loss linear": _call(target_loss, *ALSO, beyond_pi="linear"),
    "target_loss monotone": _call(target_loss, beyond_pi="monotone"),
    "row_statistics D512": _call(row_statistics, *ALSO, "sm_86", "sm_120", d=512, **HALF),
    "row_statistics D512 everything": _call(row_statistics, *ALSO, "sm_89", d=512, **HALF, **FULL),
    "row_statistics D512 classes": _call(row_statistics, d=512, **HALF, classes=100_000),
    "row_statistics D500 fp16": _call(row_statistics, *MAIN, d=500, dtype=FP16, normalize=False),
    "row_statistics D500": _call(row_statistics, d=500, **HALF, **FULL),
    "row_statistics D512 fp32": _call(row_statistics, *ALSO, "sm_86", d=512, **WIDE, extra=True),
    "row_statistics D512 fp32 plain": _call(row_statistics, d=512, **WIDE),
    "row_statistics D500 fp32": _call(row_statistics, d=500, **WIDE),
    "row_statistics D512 tf32": _call(row_statistics, d=512, **TF32),
    "row_statistics D512 tf32 everything": _call(row_statistics, d=512, **TF32, **FULL),
    "row_statistics D512 mixed": _call(row_statistics, "sm_90", d=512, **MIXED),
    "row_statistics D512 mixed everything": _call(row_statistics, d=512, **MIXED, **FULL),
    "row_statistics D512 rounded": _call(row_statistics, "sm_80", d=512, **ROUNDED),
    "row_statistics D512 rounded everything": _call(row_statistics, d=512, **ROUNDED, **FULL),
    "row_statistics D256": _call(row_statistics, *MAIN, d=256, **HALF, extra=True),
    "row_statistics D128": _call(row_statistics, *MAIN, d=128, **HALF),
    "row_statistics D128 everything": _call(row_statistics, d=128, **HALF, **FULL),
    "row_statistics D128 rounded": _call(row_statistics, *ALSO, d=128, **ROUNDED, extra=True),
    "row_statistics D512 bent": _call(row_statistics, "sm_90", d=512, **HALF, bent=True),
    "row_statistics D512 all bent": _call(row_statistics, *ALSO, d=512, **HALF, **BENT),
    "row_statistics D500 bent": _call(row_statistics, "sm_80", d=500, **HALF, **BENT),
    "row_statistics D512 fp32 bent": _call(row_statistics, "sm_100", d=512, **WIDE, **BENT),
    "row_statistics D512 tf32 bent": _call(row_statistics, d=512, **TF32, **BENT),
    "row_statistics D512 rounded bent": _call(row_statistics, d=512, **ROUNDED, **BENT),
    "row_statistics D256 bent": _call(row_statistics, "sm_86", d=256, **HALF, bent=True),
    "row_statistics D128 bent": _call(row_statistics, "sm_90", d=128, **HALF, **BENT),
    "row_statistics D128 rounded bent": _call(row_statistics, d=128, **ROUNDED, **BENT),
    "class_rules": _call(class_rules, d=512, **HALF),
    "class_rules bent": _call(class_rules, *MAIN, d=512, **HALF, bent=True, **LABELS),
    "class_rules sums": _call(class_rules, d=512, **HALF, rule="summed_softmax", bent=True),
    "class_rules sface": _call(class_rules, *ALSO, d=512, **HALF, rule="sface"),
    "class_rules sphereface2": _call(class_rules, *MAIN, d=512, **HALF, rule="sphereface2", many=4),
    "class_rules best": _call(class_rules, *ALSO, "sm_86", d=512, **HALF, bent=True, **CENTERS),
    "class_rules best sface": _call(class_rules, d=512, **HALF, rule="sface", **CENTERS),
    "class_rules soft": _call(class_rules, *ALSO, "sm_120", d=512, **HALF, **SOFT),
    "class_rules soft sphereface2": _call(class_rules, d=512, **HALF, rule="sphereface2", **SOFT),
    "class_rules D500": _call(class_rules, "sm_90", d=500, **HALF, **SOFT),
    "class_rules fp32": _call(class_rules, *ALSO, d=512, **WIDE, rule="sphereface2", **LABELS),
    "class_rules fp32 sface": _call(class_rules, "sm_90", d=512, **WIDE, rule="sface"),
    "class_rules fp32 best": _call(class_rules, "sm_89", d=512, **WIDE, **CENTERS),
    "class_rules fp32 soft": _call(class_rules, *MAIN, d=500, **WIDE, rule="sphereface2", **SOFT),
    "class_rules tf32": _call(class_rules, d=512, **TF32, rule="sface", **LABELS),
    "class_rules tf32 best": _call(class_rules, d=512, **TF32, rule="sface", **CENTERS),
    "class_rules tf32 soft": _call(class_rules, d=512, **TF32, rule="sphereface2", **SOFT),
    "class_rules mixed": _call(class_rules, "sm_90", d=512, **MIXED, rule="sface", **CENTERS),
    "class_rules rounded": _call(class_rules, "sm_80", d=512, **ROUNDED, rule="sface", **LABELS),
    "class_rules rounded best": _call(class_rules, d=512, **ROUNDED, **CENTERS),
    "class_rules rounded soft": _call(class_rules, d=512, **ROUNDED, bent=True, **SOFT),
    "pairs rows": _call(pairs, "sm_90", "sm_100", d=512, **HALF, biases=True),
    "pairs rows masks": _call(pairs, d=512, **HALF, **MASKS),
    "pairs two sides": _call(pairs, *MAIN, "sm_86", d=512, **HALF, biases=True, cols=True),
    "pairs everything": _call(pairs, *ALSO, "sm_120", d=512, **HALF, **TWO),
    "pairs triangle": _call(pairs, *ALSO, d=512, **HALF, triangle=True, **MASKS),
    "pairs softplus": _call(pairs, d=512, **HALF, reduction="softplus", biases=True, cols=True),
    "pairs softplus D500": _call(pairs, "sm_90", d=500, dtype=FP16, reduction="softplus", **TWO),
    "pairs relu": _call(pairs, d=512, **HALF, reduction="relu", **MASKS),
    "pairs attention": _call(pairs, *ALSO, "sm_89", d=512, **HALF, **ATTEND),
    "pairs attention plain": _call(pairs, d=512, **HALF, attention=512, biases=True),
    "pairs fp32": _call(pairs, "sm_80", "gfx942", d=512, **WIDE, **TWO),
    "pairs fp32 two sides": _call(pairs, d=512, **WIDE, biases=True, cols=True),
    "pairs fp32 rows": _call(pairs, d=512, **WIDE, biases=True),
    "pairs fp32 rows masks": _call(pairs, d=512, **WIDE, **MASKS),
    "pairs fp32 attention": _call(pairs, "sm_90", d=512, **WIDE, attention=512, biases=True),
    "pairs fp32 attention masks": _call(pairs, d=512, **WIDE, **ATTEND),
    "pairs tf32": _call(pairs, "sm_90", d=512, **TF32, triangle=True, **MASKS),
    "pairs tf32 two sides": _call(pairs, d=512, **TF32, biases=True, cols=True),
    "pairs tf32 rows": _call(pairs, d=512, **TF32, biases=True),
    "pairs tf32 rows masks": _call(pairs, d=512, **TF32, **MASKS),
    "pairs tf32 attention": _call(pairs, d=512, **TF32, attention=512, biases=True),
    "pairs tf32 attention masks": _call(pairs, d=512, **TF32, **ATTEND),
    "pairs mixed": _call(pairs, "sm_100", d=512, **MIXED, **TWO),
    "pairs rounded": _call(pairs, "sm_80", d=512, **ROUNDED, cols=True),
    "pairs rounded everything": _call(pairs, d=512, **ROUNDED, **TWO),
    "pairs rounded rows": _call(pairs, d=512, **ROUNDED, biases=True),
    "pairs rounded rows masks": _call(pairs, d=512, **ROUNDED, **MASKS),
    "pairs rounded attention": _call(pairs, d=512, **ROUNDED, attention=512, biases=True),
    "pairs rounded attention masks": _call(pairs, d=512, **ROUNDED, **ATTEND),
    "distances": _call(distances, *ALSO, "sm_86", kind="euclidean", d=128, **HALF),
    "distances D100": _call(distances, kind="euclidean", d=100, **HALF),
    "distances fp32": _call(distances, kind="euclidean", d=128, **WIDE),
    "distances fp32 D100": _call(distances, *ALSO, kind="euclidean", d=100, **WIDE),
    "distances fp32 odd": _call(distances, "sm_90", kind="euclidean", d=128, **WIDE, **ODD),
    "distances fp16 D100": _call(distances, "sm_80", kind="sqeuclidean", d=100, dtype=FP16),
    "distances fp16": _call(distances, kind="sqeuclidean", d=128, dtype=FP16),
    "distances tf32": _call(distances, "sm_90", kind="euclidean", d=128, **TF32),
    "distances tf32 D100": _call(distances, kind="euclidean", d=100, **TF32),
    "distances rounded": _call(distances, "sm_100", kind="euclidean", d=128, **ROUNDED),
    "distances rounded D100": _call(distances, kind="euclidean", d=100, **ROUNDED),
    "distances dot": _call(distances, "sm_80", "gfx942", kind="dot", d=128, **HALF),
    "pairs apart": _call(pairs, *ALSO, "sm_120", d=512, **HALF, **APART_TWO),
    "pairs apart D500": _call(pairs, d=500, **HALF, **APART),
    "pairs apart triangle": _call(pairs, "sm_90", d=512, **WIDE, apart=True, triangle=True),
    "pairs apart fp32": _call(pairs, "sm_80", d=512, **WIDE, **APART_TWO),
    "pairs apart tf32": _call(pairs, d=512, **TF32, **APART_TWO),
    "pairs apart softplus": _call(pairs, d=512, **WIDE, reduction="softplus", **APART_TWO),
    "pairs apart rounded": _call(pairs, "sm_100", d=512, **ROUNDED, **APART_TWO),
    "pairs apart rows": _call(pairs, d=512, **HALF, apart=True),
    "pairs apart attention": _call(pairs, *ALSO, d=512, **HALF, **APART_ATTEND),
    "pairs apart attention plain": _call(pairs, d=512, **WIDE, apart=True, attention=512),
    "pairs apart rounded attention": _call(pairs, d=512, **ROUNDED, **APART_ATTEND),
    "topk": _call(topk, *ALSO, "sm_120", keep=128, d=128, **HALF, everything=True),
    "topk few": _call(topk, "sm_90", keep=17, d=512, **HALF, match="same"),
    "topk few fp32": _call(topk, keep=17, d=512, **WIDE, match="same"),
    "topk few rounded": _call(topk, keep=17, d=512, **ROUNDED, match="same"),
    "topk D100": _call(topk, *MAIN, keep=128, d=100, **HALF, **CHOSEN),
    "topk fp32": _call(topk, *ALSO, keep=128, d=128, **WIDE, **CHOSEN),
    "topk fp32 D100": _call(topk, "sm_80", "sm_90", keep=128, d=100, **WIDE, **CHOSEN),
    "topk rounded": _call(topk, keep=128, d=128, **ROUNDED, **CHOSEN),
    "topk rounded D100": _call(topk, *MAIN, keep=128, d=100, **ROUNDED, **CHOSEN),
    "topk int8": _call(
        topk, "sm_80", "sm_90", keep=26, d=128, **HALF, y_dtype=torch.int8, everything=True
    ),
    "topk stored": _call(topk, keep=200, d=128, **HALF, **CHOSEN),
    "topk stored fp32 D100": _call(topk, *ALSO, keep=200, d=100, **WIDE, **CHOSEN),
    "topk stored rounded": _call(topk, keep=200, d=128, **ROUNDED, **CHOSEN),
    "divergence": _call(divergence, *ALSO, "sm_120", d=512, **HALF),
    "divergence everything": _call(divergence, *MAIN, d=512, **HALF, **FULL, kind="reverse"),
    "divergence probabilities": _call(divergence, *ALSO, d=512, **HALF, **FULL, kind=JENSEN),
    "divergence D500 fp16": _call(divergence, "sm_90", d=500, dtype=FP16, **FULL, kind=VARIATION),
    "divergence fp32": _call(divergence, *ALSO, "sm_86", d=512, **WIDE),
    "divergence fp32 everything": _call(divergence, d=512, **WIDE, **FULL, kind=BERNOULLI),
    "divergence fp32 probabilities": _call(divergence, "sm_80", d=512, **WIDE, **FULL, kind=JENSEN),
    "divergence fp32 D500": _call(divergence, "sm_90", d=500, **WIDE, **FULL, kind=JENSEN),
    "divergence fp32 widths": _call(divergence, d=512, **WIDE, **FULL, kind=JENSEN, teacher_d=256),
    "divergence fp32 D500 widths": _call(divergence, d=500, **WIDE, kind=JENSEN, teacher_d=300),
    "divergence tf32": _call(divergence, "sm_90", d=512, **TF32, kind=VARIATION),
    "divergence tf32 D500": _call(divergence, d=500, **TF32, **FULL, kind=VARIATION),
    "divergence mixed": _call(divergence, "sm_100", d=512, **MIXED, kind="power"),
    "divergence rounded": _call(divergence, "sm_80", d=512, **ROUNDED, **FULL, kind=VARIATION),
    "divergence rounded D500": _call(divergence, d=500, **ROUNDED, **FULL, kind=VARIATION),
    "divergence dense": _call(divergence, "sm_90", d=512, **HALF, dense=True, kind="power"),
    "divergence dense fp32": _call(divergence, d=512, **WIDE, dense=True, kind="squared"),
    # their scores are read one by one
    "divergence dense classes": _call(divergence, d=500, **HALF, **FULL, dense=True),
    "maxsim D128": _call(maxsim, *ALSO, "sm_89", d=128, **HALF),
    "maxsim D96": _call(maxsim, *ALSO, d=96, **HALF),
    "maxsim D768": _call(maxsim, *ALSO, "sm_120", d=768, **HALF),
    "maxsim one query": _call(maxsim, "sm_90", d=128, **HALF, shape=ONE_QUERY),
    "maxsim one query D768": _call(maxsim, d=768, **HALF, shape=ONE_QUERY),
    "maxsim D770 fp16": _call(maxsim, "sm_80", d=770, dtype=FP16),
    "maxsim fp32": _call(maxsim, "sm_80", "gfx942", d=128, **WIDE),
    "maxsim fp32 one query": _call(maxsim, d=128, **WIDE, shape=ONE_QUERY),
    "maxsim fp32 D770": _call(maxsim, d=770, **WIDE),
    "maxsim fp32 D768": _call(maxsim, d=768, **WIDE),
    "maxsim fp32 one query D768": _call(maxsim, d=768, **WIDE, shape=ONE_QUERY),
    "maxsim tf32 D770": _call(maxsim, d=770, **TF32),
    "maxsim rounded D770": _call(maxsim, d=770, **ROUNDED),
    "maxsim tf32": _call(maxsim, d=128, **TF32),
    "maxsim tf32 D768": _call(maxsim, d=768, **TF32),
    "maxsim tf32 one query": _call(maxsim, d=128, **TF32, shape=ONE_QUERY),
    "maxsim tf32 one query D768": _call(maxsim, d=768, **TF32, shape=ONE_QUERY),
    "maxsim rounded": _call(maxsim, d=128, **ROUNDED),
    "maxsim rounded D768": _call(maxsim, d=768, **ROUNDED),
    "maxsim rounded one query": _call(maxsim, d=128, **ROUNDED, shape=ONE_QUERY),
    "maxsim rounded one query D768": _call(maxsim, d=768, **ROUNDED, shape=ONE_QUERY),
}


def compilations(arch: str, tested: bool = False) -> dict[Compilation, str]:
    """Every distinct kernel of the calls on a target, with the first call that launches it.

    tested: of the calls alone that name the target.
    """
    out: dict[Compilation, str] = {}
    for name, call in CALLS.items():
        # reasons_against refuses tf32 on AMD
        refused = arch in AMD and call.options.get("precision") == "tf32"
        if arch in call.tested if tested else not refused:
            for key in launches(arch, call.steps()):
                out.setdefault(key, name)
    return out


def selection() -> dict[str, dict[Compilation, str]]:
    """What `make gpu-gate` compiles, target by target: of the tested calls' kernels

    - of those that share a target, a kernel and a tile, the one with the most inputs;
    - on some target what each constant of a kernel can be, and each type of its arguments.
    """
    found = {arch: compilations(arch, tested=True) for arch in NVIDIA + AMD}
    kept = {arch: _richest(keys) for arch, keys in found.items()}
    seen = {fact for keys in kept.values() for key in keys for fact in _facts(key)}
    for arch, keys in found.items():
        for key in keys:
            if not _facts(key) <= seen:
                kept[arch].add(key)
                seen |= _facts(key)
    return {
        arch: {key: call for key, call in keys.items() if key in kept[arch]}
        for arch, keys in found.items()
    }


def _richest(found: Iterable[Compilation]) -> set[Compilation]:
    kept: dict[tuple, Compilation] = {}
    for key in found:
        constants = dict(key.constants)
        sizes = tuple(constants.get(name) for name in (*SIZES, "EVEN"))
        group = key.name, sizes, key.warps, key.stages
        if group not in kept or _given(key) > _given(kept[group]):
            kept[group] = key
    return {*kept.values()}


def _facts(key: Compilation) -> set[tuple]:
    """Each constant by its value and each argument by its type, those of a group by themselves."""
    constants = {(key.name, *pair) for pair in key.constants if isinstance(pair[0], str)}
    kinds = {
        (key.name, name, place, kind)
        for name, group in key.signature
        for place, kind in enumerate(group if isinstance(group, tuple) else (group,))
    }
    return constants | kinds


def _given(key: Compilation) -> int:
    """How many arguments the kernel reads, each of a group by itself, and no constants."""

    def count(kind: Any) -> int:
        return sum(map(count, kind)) if isinstance(kind, tuple) else kind != "constexpr"

    return sum(count(kind) for _, kind in key.signature)
