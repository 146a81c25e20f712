"""The suite `small`: the losses of metric learning at N = 32 to 1,024, and where each crosses.

`fused-losses bench --suite small` has every loss beside eager, torch.compile and, where it is
installed, pytorch-metric-learning, in turn, and ends in one table over N.
"""

from __future__ import annotations

from dataclasses import replace

from fused_losses.bench import measure
from fused_losses.bench.measure import Result
from fused_losses.bench.micro.cases import Case

WIDTH, CLASSES = 128, 1000
BATCHES = (32, 64, 128, 256, 512, 1024)
ON_ROWS = (
    "info_nce",
    "supervised_contrastive",
    "multi_similarity",
    "circle",
    "contrastive",
    "batch_hard_triplet",
)
# of each case: what a training would otherwise run
RIVALS = ("eager", "torch.compile", "pytorch-metric-learning")

SHAPES: list[tuple[str, tuple[int, ...]]] = [
    *((name, (n, WIDTH)) for name in ON_ROWS for n in BATCHES),
    *(("margin_softmax", (n, CLASSES, WIDTH)) for n in BATCHES),
]


def chosen(case: Case) -> Case:
    """The case with our float32 form and the suite's rivals alone."""
    ours = case.ours[:1]
    kept = {k: run for k, run in case.providers.items() if k in ours or k in RIVALS}
    return replace(case, providers=kept, ours=ours)


def crossings(found: list[tuple[str, int, list[Result]]]) -> list[str]:
    """Markdown: a row a loss and rival, their time over ours for each N; above 1 ours is faster."""
    batches = sorted({n for _, n, _ in found})
    lines = [
        "## Small batches: their time over ours, medians of paired turns",
        "",
        "| loss | rival |" + "".join(f" N={n:,} |" for n in batches),
        "|---|---|" + "---|" * len(batches),
    ]
    names = list(dict.fromkeys(name for name, _, _ in found))
    for name in names:
        rows: dict[str, dict[int, str]] = {}
        for _, n, (ours, *rivals) in (entry for entry in found if entry[0] == name):
            rows.setdefault("ours, ms", {})[n] = f"{ours.median_ms:.2f}"
            for rival in rivals:
                ratio = measure.paired_ratio(ours, rival)
                rows.setdefault(rival.name, {})[n] = "" if ratio != ratio else f"{ratio:.2f}x"
        for rival, cells in rows.items():
            lines.append(
                f"| {name} | {rival} |" + "".join(f" {cells.get(n, '')} |" for n in batches)
            )
    return lines
