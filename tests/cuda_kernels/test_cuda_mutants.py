"""Faults planted in the project's own CUDA kernels: a case notices each, or it changes nothing.

A barrier less, an index one further, <= in the place of <: every one that `cuda_mutants.plant`
finds in a source. The harness must see them, and the cases must reach them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_mutants
import pytest
from mutants import Fault, Survivor, unexplained
from places import search_path

pytest.importorskip("triton")

# faults that change no result: their kind, the line, and why
EQUIVALENT: dict[str, list[Survivor]] = {
    "triplets": [
        ("<=", "if (kind != Triplet::kAll && run.from < n) {", "from = n: empty either way"),
        ("<=", "part == 0 || part < positives;", "a part without positives adds nothing"),
        ("<=", "tile = tile_of_next; tile < row.columns;", "each column is tested of its own"),
        ("<=", "tile = 0; tile < row.columns;", "each column is tested of its own"),
        ("<=", "tile = 0; broken && tile < row.columns;", "each column is tested of its own"),
        ("<=", "k < n; k += blockDim.x) s.count[k] = 0;", "nobody reads the count behind the last"),
        ("<=", "if (run.to < n) atomicAdd(&s.count[run.to], -1);", "nor adds it up"),
        ("<=", "for (int k = from; k < to; ++k) {", "what the next thread writes there, too"),
        ("<=", "!(c.score[u] < INFINITY)", "an infinite negative violates nothing"),
        ("no barrier", "__syncthreads();", "the row's last: the sums before it have their own"),
    ],
    "row_statistics": [
        ("<=", "for (int64_t start = 0; start < a.length;", "each pack is tested of its own"),
        ("<=", "i < kStep && j + i < a.length; i += kFour", "the pack is not stored"),
        ("<=", "if (j < a.length) st_pack(out + j, to);", "what follows the columns is not read"),
    ],
    "maxsim": [
        ("<=", "(same && where < at)", "equal places are the same"),
        ("<=", "for (int64_t e0 = 0; e0 < a.d;", "each coordinate is tested of its own"),
        ("<=", "for (int64_t t0 = 0; t0 < a.query_tokens;", "each token is tested of its own"),
        ("<=", "k0 < kStaged && t0 + k0 < a.query_tokens;", "each token is tested of its own"),
        ("no barrier", "__syncwarp();", "the shuffles make the host wait, but do not order memory"),
        ("no barrier", "__syncwarp();", "as above: the emulator of PTX takes these for races"),
    ],
    "pairs": [
        ("<=", "first < a.row_end; first += step", "each row is tested of its own"),
        ("no barrier", "__syncthreads();", "one piece a block here; test_pairs.py has several"),
        ("no barrier", "__syncthreads();", "of `pair_split`: a tile a block here"),
        ("<=", "if (i < a.n && j < a.m) {", "each column is tested of its own"),
        ("no barrier", "__syncwarp();", "the shuffles make the host wait, but do not order memory"),
    ],
    "topk": [
        ("<=", "step = p.begin; step < p.end; step += kStep", "each column is tested of its own"),
        ("<=", "step = p.begin; step < p.end; step += kStep", "each column is tested of its own"),
        ("<=", "if (z[e] < low || at >= p.end) continue;", "a tie further on changes no list"),
        ("<=", "for (int s = 0; s < a.keep; ++s) {", "one choice more, which no lane stores"),
        ("<=", "s < a.slots; s += kWarp) list[s]", "what lies behind a list is not in use yet"),
        ("<=", "s < a.slots; s += kThreads) list[s] = kNothing", "as above"),
        ("<=", "e < kNeighbours && c + e < a.columns", "the tile is wider than its columns"),
        (
            "one further",
            "static_cast<const double*>(row) + k",
            "queries are never doubles",
        ),
        ("<=", "k < d; k += int64_t(group) * kWide", "each element is tested of its own"),
        ("<=", "* kWarps + threadIdx.x / kWarp) * per; base < a.rows;", "so is each row"),
        (
            "one further",
            "if (longest > ld(mine)) st(mine, longest);",
            "all parts are compared",
        ),
        (
            "one further",
            "if (longest > ld(mine)) st(mine, longest);",
            "all parts are compared",
        ),
        ("<=", "a.order == b.order && a.column < b.column", "columns differ"),
        ("<=", "base = begin; base < end; base += a.width", "each column is tested of its own"),
        ("<=", "first = warp * per; first < a.width;", "each place is tested of its own"),
        ("no barrier", "__syncwarp();", "the next step's shuffles make the host wait"),
        ("no barrier", "__syncthreads();", "a row's last: threads meet before they read again"),
        ("no barrier", "__syncthreads();", "likewise"),
    ],
    "row_update": [
        ("<=", "lanes < kWarp && lanes * N < width", "a row on more lanes than it needs"),
        ("<=", "first < a.count; first += step", "each row is tested of its own"),
    ],
}


@pytest.mark.mutants
@pytest.mark.slow
@pytest.mark.parametrize("source", EQUIVALENT)
def test_planted_faults_are_noticed(source: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()}
    command = [sys.executable, cuda_mutants.__file__, source, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["planted"] > 10
    left = unexplained((Fault(**each) for each in found["unnoticed"]), EQUIVALENT[source])
    assert not left, left
