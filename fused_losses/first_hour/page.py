"""`report.md`: the lines of a first hour in tables, failures first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fused_losses.base.records import told
from fused_losses.first_hour.plan import STAGES
from fused_losses.first_hour.record import FAILED, LINES, SKIPPED, HourRecord

REHEARSAL = """> **A rehearsal, without a GPU**: kernels interpreted or executed on the host, small
> shapes. Its times are those of the rehearsal's own machine; bounds beside them are there to show
> the page, and nothing follows from them.
"""


def page(record: HourRecord) -> str:
    """The whole report."""
    entries = list(record.ended().values())
    notes = [e for e in record.entries() if "identity" in e]
    identity = notes[0]["identity"] if notes else {}
    counts = Counter(e["state"] for e in entries)
    out = ["# The first hour", ""]
    out += [", ".join(f"{k} {v}" for k, v in identity.items()) + ".", ""] if identity else []
    if identity.get("rehearsal"):
        out += [REHEARSAL]
    ends = ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "none"
    # written after each line: this one too
    out += [f"Units: {ends}. {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC.", ""]
    failed = [e for e in entries if e["state"] == FAILED]
    if failed:
        rows = [(e["unit"], e["told"]) for e in failed]
        out += ["## Failed", "", *table(("unit", "why"), rows), ""]
    for stage in STAGES:
        mine = [e for e in entries if e["unit"].partition("/")[0] == stage.name]
        if mine:
            try:
                lines = SECTIONS[stage.name](mine)
            except Exception as error:  # a line that cannot be shown must not end the hour
                lines = [f"not shown, {told(error)}: see {LINES}"]
            out += [f"## {stage.name}: {stage.what}", "", *lines, *[""] * bool(lines)]
            skipped = [e for e in mine if e["state"] == SKIPPED]
            if skipped:
                out += [f"- not done: {e['unit']}: {e['told']}" for e in skipped] + [""]
    return "\n".join(out).rstrip() + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(map(cell, row))} |" for row in rows]


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def rows_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for entry in entries for row in entry["rows"]]


def number(value: object) -> float:
    """JSON holds what is not finite as a string, and what is not known as null."""
    return float("nan") if value is None else float(str(value))


def _probe(entries: list[dict[str, Any]]) -> list[str]:
    rows = rows_of(entries)
    lines = table(("what", "told"), ((r["what"], r["told"]) for r in rows if "what" in r))
    peers = ", ".join(f"{r['peer']} {r['version']}" for r in rows if "peer" in r)
    return [*lines, "", f"Peers: {peers}."] if peers else lines


def _judged(entries: list[dict[str, Any]]) -> list[str]:
    """Of rows of verify those that are nearest their bounds, and how many there are."""
    rows = rows_of(entries)
    if not rows:
        return []
    share = lambda r: (r["passed"], -number(r["error"]) / max(number(r["bound"]), 1e-300))
    rows = sorted(rows, key=share)
    good = sum(r["passed"] for r in rows)
    said = f"{good} of {len(rows)} rows are within their bounds. The nearest to them, or beyond:"
    shown = rows[: max(20, len(rows) - good)]
    lines = table(
        ("op", "backend", "dtype", "shape", "error", "bound", ""),
        (
            (r["op"], r["backend"], r["dtype"], "x".join(map(str, r["shape"])))
            + (f"{number(r['error']):.1e}", f"{number(r['bound']):.1e}")
            + (r["note"] or ("pass" if r["passed"] else "FAIL"),)
            for r in shown
        ),
    )
    return [said, "", *lines]


def _sanitized(entries: list[dict[str, Any]]) -> list[str]:
    done = [e for e in entries if e["rows"]]
    rows = [(e["unit"], e["state"], e["told"]) for e in done]
    return table(("unit", "", "told"), rows) if rows else []


def _heads(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        if not entry["rows"]:
            continue
        rows = entry["rows"]
        rivals = list(dict.fromkeys(name for r in rows for name in r["ratios"]))
        heads = ("", "µs", "extra MiB", *(f"against {name}" for name in rivals))
        lines += [f"### {rows[0]['case']}", "", entry["told"], ""]
        cells = []
        for r in rows:
            ratios = [f"{number(r['ratios'][n]):.2f}x" if n in r["ratios"] else "" for n in rivals]
            known = [number(r["us"]), number(r["extra_mib"])]
            cells.append((r["name"], *([r["error"], ""] if r["error"] else known), *ratios))
        lines += [*table(heads, cells), ""]
    return lines


def _launched(entries: list[dict[str, Any]]) -> list[str]:
    heads = ("op", "shape", "our kernels", "PyTorch's operators", "on the device", "host, µs")
    heads += ("µs", "peak MiB", "told MiB")
    cells = []
    for r in sorted(rows_of(entries), key=lambda r: -number(r["us"])):
        planned = r["told_mib"]
        explained = planned if isinstance(planned, str) else number(planned)
        launched = r["op"], r["shape"], r["kernels"], r["operators"], r.get("on_device", "")
        measured = (number(r[key]) for key in ("host_us", "us", "peak_mib"))
        cells.append((*launched, *measured, explained))
    return table(heads, cells)


def _modelled(entries: list[dict[str, Any]]) -> list[str]:
    """The farthest from the model first; what has no bound last."""
    heads = (
        "op",
        "form",
        "shape",
        "µs",
        "bound of the form, µs",
        "over it",
        "floor, µs",
        "busiest",
    )
    rows = sorted(rows_of(entries), key=lambda r: -number(r.get("over", 0.0)))
    return table(
        heads,
        (
            (r["op"], r["way"], r["shape"], number(r["us"]))
            + tuple(number(r[k]) if k in r else "" for k in ("model_us", "over", "floor_us"))
            + (r.get("busiest", ""),)
            for r in rows
        ),
    )


SECTIONS = {
    "probe": _probe,
    "verify": _judged,
    "sanitizer": _sanitized,
    "heads": _heads,
    "launches": _launched,
    "graphs": _judged,
    "devices": _judged,
    "model": _modelled,
    "more": _judged,
}
