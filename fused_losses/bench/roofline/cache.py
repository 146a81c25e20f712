"""A model of L2: which of the launches' bytes go on to DRAM."""

from __future__ import annotations

from collections import OrderedDict

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.bench.roofline.work import Access

LINE = 128 << 10  # bytes of a piece of a tensor in the model of L2
L2_SHARE = 0.75  # of L2 that a stream leaves to what is reused; assumed


class L2:
    """The last-used pieces of tensors, so many bytes of them; what DRAM reads and writes."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held = capacity, 0
        self.pieces: OrderedDict[tuple, list] = OrderedDict()  # -> [bytes, dirty]

    def touch(self, a: Access) -> int:
        """DRAM bytes of one access: what has to be fetched, and what is thrown out changed."""
        traffic = 0
        first = 0 if a.block else a.begin
        key, end = a.storage._cdata, first + a.size
        place = a.begin if a.block else -1
        if a.size > self.capacity / 2:
            traffic += (a.sweeps - 1) * a.size
        for piece in range(first // LINE, ceil_div(end, LINE)):
            size = min(end, (piece + 1) * LINE) - max(first, piece * LINE)
            entry = self.pieces.pop((key, place, piece), None)
            if entry is None:
                entry = [0, False]
            missing = max(0, size - entry[0])
            if missing and not a.write:
                traffic += missing
            self.held += missing
            entry[0] += missing
            entry[1] |= a.write
            self.pieces[key, place, piece] = entry
            while self.held > self.capacity:
                _, (old, dirty) = self.pieces.popitem(last=False)
                self.held -= old
                traffic += old if dirty else 0
        return traffic

    def flush(self, outputs: set[int]) -> int:
        """What is still to be written of results; dead scratch is never asked for again."""
        return sum(n for (key, *_), (n, dirty) in self.pieces.items() if dirty and key in outputs)
