"""What is planted in the C++ CPU kernels, and where: every place of each kind below.

| kind | a fault |
|---|---|
| bound | < for <=, > for >= and the other way round: ends of loops, masks, ties |
| equal | != for ==, and the other way round |
| always, never | of an `if` |
| dropped | an assignment or a call that is left out: partial sums, merges, rescaling, stores |
| sign | + for -, and the other way round: offsets, too |
| factor | the second factor of a product is one more: strides, too; of room that is taken, none |
| further | an index one further |
| extreme | min for max, and the other way round |

A fault is text that is added around an expression, so that the source keeps its lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from mutants import Fault

# declared before each planted source: a fault that an instruction set does not compile is not known
HELPERS = """
#include <cmath>
extern "C" char fused_losses_known[];
template <int N> struct Known { static char here; };
template <int N> char Known<N>::here = (fused_losses_known[N] = 1);
#define FL_PLANTED template <int N> [[gnu::always_inline]] inline constexpr
FL_PLANTED bool planted() {
  if (!std::is_constant_evaluated()) (void)&Known<N>::here;
  return planted(N);
}
template <int A, int B> [[gnu::always_inline]] inline constexpr bool planted_if(bool holds) {
  return (holds | planted<A>()) & !planted<B>();
}
struct PlantedSign { bool turned; };
template <class V> [[gnu::always_inline]] inline constexpr auto operator*(PlantedSign s, V v) {
  return s.turned ? -v : +v;
}
FL_PLANTED PlantedSign planted_sign() { return {planted<N>()}; }
template <int N, class V> [[gnu::always_inline]] inline constexpr V planted_more(V v) {
  if constexpr (std::is_arithmetic_v<V>) {
    return planted<N>() ? V(v + 1) : v;
  } else {
    return planted<N>() ? v + std::remove_cvref_t<decltype(v[0])>(1) : v;
  }
}
#define FL_COMPARE(name, right, wrong)                                              \\
  template <int N, class A, class B>                                                \\
  [[gnu::always_inline]] inline constexpr auto name(const A& a, const B& b) {       \\
    return planted<N>() ? (a wrong b) : (a right b);                                \\
  }
FL_COMPARE(planted_less, <, <=)
FL_COMPARE(planted_at_most, <=, <)
FL_COMPARE(planted_greater, >, >=)
FL_COMPARE(planted_at_least, >=, >)
FL_COMPARE(planted_equal, ==, !=)
FL_COMPARE(planted_unequal, !=, ==)
template <int N, class T> constexpr T planted_max(const T& a, const T& b) {
  return (a < b) != planted<N>() ? b : a;
}
template <int N, class T> constexpr T planted_min(const T& a, const T& b) {
  return (b < a) != planted<N>() ? b : a;
}
"""
COMPARISONS = {
    "<": ("bound", "less"),
    "<=": ("bound", "at_most"),
    ">": ("bound", "greater"),
    ">=": ("bound", "at_least"),
    "==": ("equal", "equal"),
    "!=": ("equal", "unequal"),
}
COMPARE = re.compile(r"(?<= )(<=|>=|==|!=|<|>)(?= )")
SIGN = re.compile(r"(?<=[\w\])}] )[+-] (?=\S)")
FACTOR = re.compile(r"(?<=[\w\])] \* )(?!sizeof|static_cast)[A-Za-z_][\w.]*(?:->\w+)*(?![\w(<:\[])")
FURTHER = re.compile(r"(?<=[\w\])])\[(?=[^\]])|(?<![\w:.])(?:load|store)\((?=[^)])")
EXTREME = re.compile(r"std::(max|min)(?:<(\w+)>)?\((?!\{)")
IF = re.compile(r"\bif \(")
LEFT = r"[A-Za-z_*][\w.:]*(?:->\w+|\[[^;={}]*?\]|\.\w+)*"
CALL = r"[A-Za-z_][\w:.]*(?:->\w+)*(?:<[\w:, ]+>)?\("
STATEMENT = re.compile(
    r"(?:(?<=\n)|(?<=[){] )|(?<=else ))(?: *)"
    rf"((?:{LEFT} (?:[-+*/|&^]|<<|>>)?= |\+\+{LEFT};|{CALL}))"
)
NO_CALL = re.compile(r"(?:return|if|for|while|switch|else|static_assert|sizeof|using)\b")
# whole lines that are no code of a kernel at run time
SKIPPED = re.compile(
    r"^\s*(?:#|//|template\b|using\b|static_assert\b)|\bconstexpr\b"
    r"|(?:[\w>]|\w\*) \w+\[[^;=]*\](?:[,;]| = \{)"
    # what plain vectors leave to other instruction sets
    r"|\b(?:multiply_split|split_room|kInTiles)\b"
)
ROOM = re.compile(r"\barena\.take<|\w_bytes\b")  # one more of these is no fault
ENDS_LEFT = re.compile(r"(?:&&|\|\||\?|:|=|\breturn|\||&|\^|\belse)\s+$")
ENDS_RIGHT = re.compile(r"\s(?:&&|\|\||\?|:|\||&|\^)")


class Edit(NamedTuple):
    """Text before `start` and after `end`; what lies between [start, end) stays, but for `cut`."""

    start: int
    end: int
    before: str
    after: str = ""
    cut: tuple[int, int, str] | None = None  # a part within that is replaced


def _masked(text: str) -> str:
    """The text with what is no code of generic kernels blanked, of one length."""
    out, off = [], 0
    for line in text.splitlines(keepends=True):
        if line.startswith("#if"):
            # the other instruction sets' own code
            off = 1 if off == 0 and "__AVX" in line else off + 1 if off else 0
        elif off == 1 and line.startswith(("#else", "#endif")):
            off = 0
        elif off > 1 and line.startswith("#endif"):
            off -= 1
        code = line.partition("//")[0].rstrip("\n")
        if off or SKIPPED.search(code):
            code = ""
        out.append(code.ljust(len(line) - 1) + "\n")
    return "".join(out)


def _right(text: str, at: int) -> int | None:
    """Where the operand that begins here ends."""
    depth = 0
    for i in range(at, len(text)):
        if depth == 0 and (text[i] in ")]};," or ENDS_RIGHT.match(text, i)):
            return i
        depth += (text[i] in "([{") - (text[i] in ")]}")
    return None


def _left(text: str, at: int) -> int | None:
    """Where the operand that ends here begins."""
    depth = 0
    for i in range(at, 0, -1):
        before = text[i - 1]
        apart = before.isspace() and ENDS_LEFT.search(text, max(0, i - 200), i)
        if depth == 0 and (before in "([{},;" or apart):
            return i + len(text[i:]) - len(text[i:].lstrip())
        depth += (before in ")]}") - (before in "([{")
    return None


def _closing(text: str, at: int) -> int | None:
    """The parenthesis that closes the one before `at`."""
    depth = 1
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return None


def _statement(code: str, at: int) -> int | None:
    """The end of the statement that begins here; None: it is none."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        # a block, not a value's braces
        if depth < 0 or (code[i] == "{" and code[i - 1] == " " and code[i - 2] not in "=,("):
            return None
        if code[i] == ";" and depth == 0:
            return i + 1
    return None


def _places(code: str) -> Iterator[tuple[tuple[str, ...], int, Edit]]:
    """The kinds of faults, the place, and the edit; # stands for a fault's number."""
    for m in COMPARE.finditer(code):
        kind, name = COMPARISONS[m[1]]
        start, end = _left(code, m.start() - 1), _right(code, m.end() + 1)
        if start is not None and end is not None:
            cut = (m.start() - 1, m.end() + 1, ", ")
            yield (kind,), m.start(), Edit(start, end, f"planted_{name}<#>(", ")", cut)
    for m in SIGN.finditer(code):
        yield ("sign",), m.start(), Edit(m.end(), m.end(), "planted_sign<#>() * ")
    for m in FACTOR.finditer(code):
        line = code[code.rfind("\n", 0, m.start()) + 1 : code.find("\n", m.end())]
        if ROOM.search(line):
            continue
        yield ("factor",), m.start(), Edit(m.start(), m.end(), "planted_more<#>(", ")")
    for m in FURTHER.finditer(code):
        yield ("further",), m.start(), Edit(m.end(), m.end(), "planted<#>() + ")
    for m in EXTREME.finditer(code):
        given = f", {m[2]}" if m[2] else ""
        edit = Edit(m.start(), m.end(), "", "", (m.start(), m.end(), f"planted_{m[1]}<#{given}>("))
        yield ("extreme",), m.start(), edit
    for m in IF.finditer(code):
        end = _closing(code, m.end())
        if end is not None and not re.search(r"[^=!<>]= ", code[m.end() : end]):
            edit = Edit(m.end(), end, "planted_if<#, #>(", ")")
            yield ("always", "never"), m.start(), edit
    for m in STATEMENT.finditer(code):
        end = _statement(code, m.start(1))
        if end is not None and not NO_CALL.match(m[1]):
            yield ("dropped",), m.start(1), Edit(m.start(1), end, "{ if (!planted<#>()) ", " }")


def plant(text: str, name: str, faults: list[Fault], left_out: set[tuple[str, int]]) -> str:
    """The text of the file of this name with all faults, added to those before.

    left_out: (file, line) where faults do not compile.
    """
    edits = []
    for kinds, at, edit in _places(_masked(text)):
        line = text.count("\n", 0, at) + 1
        first, last = (text.count("\n", 0, place) + 1 for place in (edit.start, edit.end))
        if any((name, one) in left_out for one in range(first, last + 1)):
            continue
        shown = text.splitlines()[line - 1].strip()
        before, cut = edit.before, edit.cut
        for kind in kinds:
            number = str(len(faults))
            before = before.replace("#", number, 1)
            cut = cut and (*cut[:2], cut[2].replace("#", number, 1))
            faults.append(Fault(kind, name, line, shown))
        edits.append(edit._replace(before=before, cut=cut))
    # at one place what closes comes first, the inner ones before the outer; then what opens
    pieces = []
    for edit in edits:
        length = edit.end - edit.start
        if edit.before:
            inner = not edit.before.startswith("planted_if")
            pieces.append((edit.start, 1 if length else 2, -length, inner, edit.start, edit.before))
        if edit.after:
            pieces.append((edit.end, 0, length, False, edit.end, edit.after))
        if edit.cut:
            pieces.append((edit.cut[0], 3, 0, False, edit.cut[1], edit.cut[2]))
    out, at = [], 0
    for start, *_, end, new in sorted(pieces):
        out += [text[at:start], new]
        at = max(at, end)
    return "".join([*out, text[at:]])
