"""A run's record as one HTML file: nothing is fetched, and it reads on paper too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from fused_losses.bench import breakdown, host, measure

WIDE, LABELS, ROW = 720, 210, 20  # of a picture, its names and its lines
STYLE = """
:root { --ink: #1d2430; --paper: #fff; --faint: #6a7280; --rule: #d8dce3; --ours: #2563b8;
  --theirs: #a9b1bd; --floor: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --paper: #14171c; --faint: #9aa3b0;
  --rule: #333a45; --ours: #6ea8f7; --theirs: #667080; --floor: #ff8a80; } }
@media print { :root { --ink: #000; --paper: #fff; --faint: #444; --rule: #bbb; --ours: #2563b8;
  --theirs: #a9b1bd; --floor: #b3261e; } body { max-width: none; padding: 0; font-size: 9pt; }
  section { break-inside: avoid; } h1, h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } th, td { padding: .1rem .35rem; font-size: 8pt; } }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.6rem; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
p.faint, figcaption { color: var(--faint); font-size: .9em; } figure { margin: .8rem 0; }
svg { width: 100%; min-width: 32rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .ours { fill: var(--ours); } svg .theirs { fill: var(--theirs); }
svg .line { stroke: var(--ours); fill: none; stroke-width: 1.5; }
svg .other { stroke: var(--theirs); fill: none; stroke-width: 1.5; }
svg .axis { stroke: var(--rule); } svg .floor { stroke: var(--floor); stroke-width: 2; }
svg .spread { stroke: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9em; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
tr.ours td:first-child { font-weight: 600; }
table.words th:last-child, table.words td:last-child { text-align: left; white-space: normal;
  min-width: 14rem; }
"""


def digits(ms: float) -> str:
    """Three of them, or whole milliseconds."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """Of the rounds; of fewer than three the ends."""
    if len(times) < 3:
        return min(times), max(times)
    low, _, high = statistics.quantiles(times, n=4)
    return low, high


def _cells(kind: str, cells: Sequence[str]) -> str:
    return "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)


def _table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "numbers"
) -> str:
    """Cells are HTML already; of each row its class comes first."""
    head = f"<thead><tr>{_cells('th', [escape(h) for h in heads])}</tr></thead>"
    body = "".join(f'<tr class="{of}">{_cells("td", cells)}</tr>' for of, cells in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _svg(height: float, parts: Sequence[str], told: str) -> str:
    inside = "".join(parts)
    head = f'<svg viewBox="0 0 {WIDE} {height:.0f}" role="img" aria-label="{escape(told, True)}">'
    caption = f"<figcaption>{escape(told)}</figcaption>"
    return f'<figure><div class="scroll">{head}{inside}</svg></div>{caption}</figure>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(of: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{of}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _bars(case: dict[str, Any], done: list[dict[str, Any]]) -> str:
    """Medians from zero on, quartiles across, each row's floor as a mark."""
    medians = {r["name"]: statistics.median(r["times_ms"]) for r in done}
    room = WIDE - LABELS - 70
    scale = room / max(medians.values())
    parts = []
    for index, r in enumerate(done):
        y, at = 6 + index * ROW, medians[r["name"]] * scale
        of = "ours" if r["name"] in case["ours"] else "theirs"
        parts.append(_text(LABELS - 8, y + 11, r["name"], "end"))
        parts.append(f'<rect class="{of}" x="{LABELS}" y="{y}" width="{at:.1f}" height="14"/>')
        low, high = (LABELS + min(q * scale, room) for q in quartiles(r["times_ms"]))
        parts.append(_line("spread", low, y + 7, high, y + 7))
        if r.get("floor_ms"):
            mark = LABELS + min(r["floor_ms"] * scale, room)
            parts.append(_line("floor", mark, y - 2, mark, y + 16))
        end = max(LABELS + at, high) + 6
        parts.append(_text(end, y + 11, f"{digits(medians[r['name']])} ms"))
    told = "Medians, with the quartiles of the rounds as a line; red: the floor of the row."
    return _svg(12 + len(done) * ROW, parts, told)


def _case(case: dict[str, Any]) -> str:
    done = [r for r in case["results"] if r["times_ms"] and not r["error"]]
    rivals = [r for r in done if r["name"] not in case["ours"]]
    heads = ["", "ms", "quartiles", "of its floor", "extra MiB", "off"]
    rows, failed = [], []
    for r in case["results"]:
        of = "ours" if r["name"] in case["ours"] else "theirs"
        if r not in done:
            failed.append((r["name"], r["error"] or "not run"))
            continue
        low, high = quartiles(r["times_ms"])
        share = r.get("share_of_floor")
        cells = [
            escape(r["name"]),
            digits(statistics.median(r["times_ms"])),
            f"{digits(low)} to {digits(high)}",
            "" if share is None else f"{share:.0%}",
            "" if r["extra_mib"] is None else f"{r['extra_mib']:,.1f}",
            "" if r["difference"] is None else f"{r['difference']:.0e}",
        ]
        for rival in rivals:
            pair = (measure.Result(x["name"], x["times_ms"]) for x in (r, rival))
            cells.append(f"{measure.paired_ratio(*pair):.2f}x" if of == "ours" else "")
        rows.append((of, cells))
    picture = _bars(case, done) if done else ""
    heads += [f"vs {r['name']}" for r in rivals]
    table = _table(heads, rows) if rows else ""
    table += "".join(f"<p>{escape(name)}: {escape(why)}</p>" for name, why in failed)
    return f"<section><h3>{escape(case['title'])}</h3>{picture}{table}</section>"


def _curves(sweep: dict[str, Any]) -> str:
    """Time against size, both axes logarithmic; a curve for each number of threads."""
    every = [p for curve in sweep["curves"] for p in curve["points"]]
    left, height = 60, 220
    ends = []
    for key in ("size", "ms"):
        values = [math.log(p[key]) for p in every]
        low, high = min(values), max(values)
        ends.append((low, max(high - low, 1e-9)))
    (x0, dx), (y0, dy) = ends

    def place(p: dict[str, float]) -> tuple[float, float]:
        x = left + (math.log(p["size"]) - x0) / dx * (WIDE - left - 90)
        return x, height - 30 - (math.log(p["ms"]) - y0) / dy * (height - 60)

    parts = [_line("axis", left, height - 24, WIDE - 20, height - 24)]
    for number, curve in enumerate(sweep["curves"]):
        spots = [place(p) for p in curve["points"]]
        of = "line" if number == 0 else "other"
        dots = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="{of}" points="{dots}"/>')
        fill = "ours" if number == 0 else "theirs"
        parts += [f'<circle class="{fill}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots]
        many = "thread" if curve["threads"] == 1 else "threads"
        parts.append(_text(spots[-1][0] + 8, spots[-1][1] + 4, f"{curve['threads']} {many}"))
    points = sweep["curves"][0]["points"]
    for p in (points[0], points[-1]):
        parts.append(_text(place(p)[0], height - 8, f"{p['size']:,}", "middle"))
    for p in (min(every, key=lambda p: p["ms"]), max(every, key=lambda p: p["ms"])):
        parts.append(_text(left - 8, place(p)[1] + 4, digits(p["ms"]), "end"))
    return _svg(height, parts, f"ms against {sweep['axis']}, both logarithmic.")


def _sweep(sweep: dict[str, Any]) -> str:
    rows = []
    for curve in sweep["curves"]:
        cliffs = ", ".join(f"{at:,}" for at in curve["cliffs"])
        rows.append(
            ("ours", [str(curve["threads"]), f"{curve['slope']:.2f}", f"{curve['residual']:.0%}",
                      f"{curve['fixed_ms']:.3g}", cliffs or "none"])
        )  # fmt: skip
    heads = ["threads", "slope", "largest residual", "fixed ms", "cliffs at"]
    title = f"{sweep['primitive']}: time against {sweep['axis']} ({sweep['at']})"
    return f"<section><h3>{escape(title)}</h3>{_curves(sweep)}{_table(heads, rows)}</section>"


def _shares(parts: list[dict[str, Any]]) -> str:
    """A bar a part, the whole width for the largest."""
    wide = 330
    scale = (WIDE - wide - 60) / max(part["share"] for part in parts)
    lines = []
    for index, part in enumerate(parts):
        y, at = 6 + index * ROW, part["share"] * scale
        lines.append(_text(wide - 8, y + 11, part["name"], "end"))
        lines.append(f'<rect class="ours" x="{wide}" y="{y}" width="{at:.1f}" height="14"/>')
        lines.append(_text(wide + at + 6, y + 11, f"{part['share']:.1%}"))
    return _svg(12 + len(parts) * ROW, lines, "Shares of the threads' time.")


def _breakdown(found: dict[str, Any]) -> str:
    rows = [
        ("ours", [escape(part["name"]), breakdown.percent(part["share"]),
                  breakdown.percent(part["of_what_ran"]), f"{part['ms']:.2f}", escape(part["how"])])
        for part in found["parts"]
    ]  # fmt: skip
    heads = ["", "of the threads' time", "of what ran", "ms of a thread", "how it was got"]
    picture = _shares(found["parts"])
    told = f"<h3>{escape(found['title'])}</h3><p>{escape(breakdown.summary(found))}</p>"
    return f"<section>{told}{picture}{_table(heads, rows, 'words')}</section>"


def _part(record: dict[str, Any]) -> str:
    """A run: when, where, and what it found."""
    found = record["host"]
    versions = ", ".join(f"{name} {at}" for name, at in found["versions"].items())
    kinds = {"growth": "How time grows", "breakdown": "Where a step's time goes"}
    kind = next((told for key, told in kinds.items() if key in record), "Ours and the rivals")
    body = [f"<h2>{kind}</h2>", f"<p>{escape(found['started'])}. {escape(versions)}.</p>"]
    body += [f"<p>{escape(line)}</p>" for line in host.lines(found)]
    body += [_case(case) for case in record.get("cases", [])]
    body += [_breakdown(b) for b in record.get("breakdown", [])]
    body += [_sweep(sweep) for sweep in record.get("growth", [])]
    return "".join(body)


def page(records: Sequence[dict[str, Any]]) -> str:
    """The whole file, a part a run."""
    title = f"Benchmarks of fused_losses {', '.join(dict.fromkeys(r['version'] for r in records))}"
    rule = (
        "A floor is the larger of two times: the products over the peak of their type, and the "
        "bytes, each input and output once, over the speed of a copy. Rows with products in "
        "bfloat16 are held to its peak; rows that keep scores do fewer products than the floor has."
    )
    body = [f"<h1>{escape(title)}</h1>", f'<p class="faint">{rule}</p>', *map(_part, records)]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"<head>{meta}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    return f'<!doctype html><html lang="en">{head}<body>{"".join(body)}</body></html>\n'
