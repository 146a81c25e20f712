"""Faults in the C++ CPU kernels that no test of theirs notices, and why: kind, line, reason."""

from __future__ import annotations

from mutants import Survivor

SURVIVORS: dict[str, list[Survivor]] = {
    "triplets": [
        ("bound", "if (positives > kFewPositives && negatives", "sorted without need"),
        ("bound", "if (positives > kFewPositives && negatives", "sorted without need"),
        ("always", "if (positives > kFewPositives && negatives", "sorted without need"),
        ("bound", "if (!(far < std::numeric_limits<T>::infinity()))", "inf is in no triplet"),
        ("never", "if (!(far < std::numeric_limits<T>::infinity()))", "inf is in no triplet"),
        ("bound", "k < n; ++k) r.count[k] += r.count[k - 1]", "nobody reads the count behind"),
        ("bound", "r.positives > kFewPositives ?", "both ways count alike"),
        ("further", "first[half - 1] <= v : first[half - 1] < v", "halves, or one more than half"),
        ("further", "first[half - 1] <= v : first[half - 1] < v", "halves, or one more than half"),
        ("sign", "Arena arena(static_cast<char*>(buffer) + thread * each)", "behind another block"),
        ("factor", "Arena arena(static_cast<char*>(buffer) + thread * each)", "a byte's gap"),
        ("factor", "i < std::min((task + 1) * kTripletRows, p.rows)", "rows done twice, alike"),
        ("never", "if (count == 0) continue;", "adds zeros"),
        ("always", "if (!r.broken) {", "what is counted is not used"),
        (
            "dropped",
            "j < round_up(p.columns, kLanes<T>); ++j) far[j] = kFar;",
            "new memory is NaN here, which is in no triplet; valgrind sees it",
        ),
    ],
    "row_update": [
        ("bound", "const float cut = size < kMost ? size : kMost;", "equal is equal"),
        ("bound", "size < kMost ? std::copysign(up, value) : value", "kMost is its own rounding"),
        ("bound", "c < p.width; c += kRowBlock", "a block of no columns"),
        (
            "sign",
            "uint64_t z = key + (static_cast<uint64_t>(row) * 4 + table)",
            "another random word",
        ),
        (
            "sign",
            "uint64_t z = key + (static_cast<uint64_t>(row) * 4 + table)",
            "another random word",
        ),
        ("dropped", "z = (z ^ (z >> 30))", "another random word"),
        ("dropped", "z = (z ^ (z >> 27))", "another random word"),
        ("sign", "random_word(row, column + static_cast<uint32_t>(i)))", "another random word"),
        ("sign", "row_word(p.key, row + p.row_offset, table)", "0 here; seen by tests of shards"),
        ("factor", "const int64_t worth = p.count * p.width / kRowWork;", "a task more or less"),
    ],
}
