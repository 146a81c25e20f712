"""What `fused-losses bench --growth` measures: a step of each primitive, and the sizes it grows in.

The losses are those of the table of cases where it has them, float32, ours alone; what no case has
is called here by its public function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_losses import functional
from fused_losses.bench.micro.cases import Case, backward
from fused_losses.bench.table import CASES
from fused_losses.primitives.row_update.op import sgd_rows_

GrowthStep = Callable[[], object]
GrowthSizes = dict[str, int]
WIDTHS = (64, 128, 256, 512)
# odd ones, powers of two and what lies beside them: of a vector, of a panel, of a tile
RAGGED_WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
RAGGED_ROWS = (1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
ROWS = (256, 512, 1024, 2048)
CLASSES = (1_000, 2_000, 4_000, 8_000, 16_000)


@dataclass(frozen=True)
class GrowthSweep:
    """A primitive's step at `sizes`, of which each of `axes` is varied while the others stay."""

    make: Callable[[GrowthSizes, str], GrowthStep]
    sizes: GrowthSizes
    axes: dict[str, tuple[int, ...]]
    # of axes: of these the time is fitted, of the others only what lies out of line is looked for
    ragged: tuple[str, ...] = field(default=("D, ragged", "N, ragged"))

    def points(self, axis: str) -> Iterator[tuple[int, GrowthSizes]]:
        """The value, and the sizes with it; "N·M" varies N, which M equals."""
        name = axis.partition(",")[0]
        for value in self.axes[axis]:
            changed = self.sizes | ({"N": value} if name == "N·M" else {name: value})
            yield (value * value if name == "N·M" else value), changed


def _of(case: Case) -> GrowthStep:
    """Its first provider, from gradients that are not there."""
    run = case.providers[case.ours[0]]

    def step() -> object:
        case.clear()
        return run()

    return step


def _listed(name: str, *letters: str) -> Callable[[GrowthSizes, str], GrowthStep]:
    """A case of the table, its sizes by letter."""

    def make(sizes: GrowthSizes, device: str) -> GrowthStep:
        shape = (sizes[letter] for letter in letters)
        return _of(CASES[name].make(*shape, device=device, rivals="none"))

    return make


def _unit(n: int, d: int, device: str, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=made))
    return rows.to(device).requires_grad_()


def _alike(n: int, device: str) -> Tensor:
    """Labels, four rows each."""
    return torch.arange(n, device=device) // 4


def _step(leaves: list[Tensor], loss: Callable[[], Tensor]) -> GrowthStep:
    def step() -> object:
        for leaf in leaves:
            leaf.grad = None
        return backward(loss())

    return step


def _nested(sizes: GrowthSizes, device: str) -> GrowthStep:
    x, y = (_unit(sizes["N"], sizes["D"], device, seed) for seed in range(2))
    widths = sorted({max(1, sizes["D"] // part) for part in (1, 2, 4)})
    return _step([x, y], lambda: functional.nested_info_nce(x, y, widths, symmetric=True).sum())


def _pairs_of_a_miner(sizes: GrowthSizes, device: str) -> GrowthStep:
    """Every row with the sixteen after it, of which those of its label are positives."""
    n = sizes["N"]
    x, labels = _unit(n, sizes["D"], device), _alike(n, device)
    first = torch.arange(n, device=device).repeat_interleave(16)
    second = (first + torch.arange(1, 17, device=device).repeat(n)) % n
    apart = first != second
    first, second = first[apart], second[apart]
    same = labels[first] == labels[second]
    pairs = (first[same], second[same], first[~same], second[~same])
    return _step([x], lambda: functional.contrastive(x, labels, indices=pairs))


def _fast_ap(sizes: GrowthSizes, device: str) -> GrowthStep:
    x, labels = _unit(sizes["N"], sizes["D"], device), _alike(sizes["N"], device)
    return _step([x], lambda: functional.fast_ap(x, labels))


def _shared_negatives(sizes: GrowthSizes, device: str) -> GrowthStep:
    x, labels = _unit(sizes["N"], sizes["D"], device), _alike(sizes["N"], device)
    return _step([x], lambda: functional.shared_negatives(x, labels, scale=30.0))


def _row_update(sizes: GrowthSizes, device: str) -> GrowthStep:
    table = torch.zeros(4 * sizes["N"], sizes["D"], device=device)
    grad = torch.ones(sizes["N"], sizes["D"], device=device)
    rows = torch.arange(0, 4 * sizes["N"], 4, device=device)
    return lambda: sgd_rows_(table, rows, grad, lr=1e-3)


def _over_pairs(make: Callable[[GrowthSizes, str], GrowthStep]) -> GrowthSweep:
    axes = {"N·M": ROWS, "D": WIDTHS, "D, ragged": RAGGED_WIDTHS, "N, ragged": RAGGED_ROWS}
    return GrowthSweep(make, {"N": 512, "D": 128}, axes)


def _over_classes(
    make: Callable[[GrowthSizes, str], GrowthStep], classes: tuple[int, ...] = CLASSES
) -> GrowthSweep:
    axes = {"C": classes, "D": WIDTHS, "D, ragged": RAGGED_WIDTHS, "N, ragged": RAGGED_ROWS}
    return GrowthSweep(make, {"N": 64, "C": classes[1], "D": 128}, axes)


SWEEPS: dict[str, GrowthSweep] = {
    "row_statistics": _over_classes(_listed("margin_softmax", "N", "C", "D")),
    "class_rules": _over_classes(_listed("sface", "N", "C", "D")),
    "divergence": _over_classes(_listed("distillation", "N", "C", "D")),
    "pairs": _over_pairs(_listed("info_nce", "N", "D")),
    "nested": _over_pairs(_nested),
    "row_rules": _over_pairs(_fast_ap),
    "shared_negatives": _over_pairs(_shared_negatives),
    "distances": _over_pairs(_listed("euclidean_gradient", "N", "D")),
    "listed": GrowthSweep(
        _pairs_of_a_miner,
        {"N": 1024, "D": 128},
        {"N": ROWS, "D": WIDTHS, "D, ragged": RAGGED_WIDTHS, "N, ragged": RAGGED_ROWS},
    ),
    "topk": GrowthSweep(
        _listed("topk", "N", "M", "D", "K"),
        {"N": 256, "M": 4096, "D": 128, "K": 16},
        {"M": (2048, 4096, 8192, 16384), "D": WIDTHS, "D, ragged": RAGGED_WIDTHS,
         "N, ragged": RAGGED_ROWS},
    ),
    "maxsim": GrowthSweep(
        _listed("maxsim", "N", "LQ", "M", "LD", "D"),
        {"N": 16, "LQ": 16, "M": 64, "LD": 64, "D": 128},
        {"M": (32, 64, 128, 256), "D": WIDTHS, "D, ragged": RAGGED_WIDTHS,
         "N, ragged": (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17)},
    ),
    "row_update": GrowthSweep(
        _row_update,
        {"N": 4096, "D": 128},
        {"N": (4096, 8192, 16384, 32768), "D": WIDTHS, "D, ragged": RAGGED_WIDTHS,
         "N, ragged": RAGGED_ROWS},
    ),
}  # fmt: skip
