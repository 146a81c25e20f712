"""The page of errors has every error that the code can raise, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import errors


@pytest.fixture(scope="module")
def raised() -> list[errors.Raised]:
    return errors.raised()


def test_every_error_is_on_the_page_and_no_other(raised: list[errors.Raised]) -> None:
    missing, unused = errors.gaps(errors.PAGE.read_text(), raised)
    assert (missing, unused) == ([], [])


def test_all_places_that_raise_are_found(raised: list[errors.Raised]) -> None:
    # found by other means: `raise` of a class of errors with a text of its own
    found = {e.place for e in raised}
    package = Path(errors.ROOT / "fused_losses")
    for path in package.rglob("*.py"):
        text = path.read_text()
        if re.search(r"raise (?:Value|Type|Index|Runtime|Data|Option)Error\(\s*f?\"", text):
            assert str(path.relative_to(errors.ROOT)) in found


def test_a_message_is_read_with_its_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    source = 'raise ValueError(f"{name}: expected {a if b else c}, " + TOLD + f"got {x!r}")\n'
    (tmp_path / "fused_losses").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "fused_losses" / "some.py").write_text('TOLD = "a word, "\n' + source)
    check = 'TORCH_CHECK_VALUE(f(a, "(,"), name, ": expected \\"x\\", got ", t.sizes());\n'
    (tmp_path / "csrc" / "some.cpp").write_text(check)
    told = errors.raised()
    assert told == [
        errors.Raised("fused_losses/some.py", "ValueError", "…: expected …, a word, got …"),
        errors.Raised("csrc/some.cpp", "ValueError", '…: expected \\"x\\", got …'),
    ]
    missing, unused = errors.gaps("* TypeError: `…: expected …`\n* `…: expected …, got …`\n", told)
    assert missing == []
    assert [p.kinds for p in unused] == [("TypeError",)]
    assert len(errors.gaps("* TypeError: `…: expected …`\n", told)[0]) == 2
