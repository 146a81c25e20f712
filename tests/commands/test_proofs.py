"""tools.proofs: a proof runs once for each state of its files."""

from __future__ import annotations

import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tools import proofs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("csrc/cuda/topk.cu", "csrc/cpu/topk.h", "tests/cuda_cases.py", "CMakeLists.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def command(code: str) -> list[str]:
    """Leaves a line in the file `runs` and ends as told."""
    return [sys.executable, "-c", f"open('runs', 'a').write('x'); {code}"]


def runs(tree: Path) -> int:
    return len((tree / "runs").read_text()) if (tree / "runs").exists() else 0


def test_a_proof_runs_once_for_each_state(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert proofs.run("mutants", command("0"), root=tree) == 0  # no record: it runs
    assert proofs.run("mutants", command("0"), root=tree) == 0
    assert runs(tree) == 1
    state = proofs.content_hash(["mutants"], tree)
    assert f"mutants: not run, unchanged since proven ({state})" in capsys.readouterr().out
    assert proofs.run("mutants", command("0"), full=True, root=tree) == 0
    assert runs(tree) == 2
    for name in ("csrc/cuda/topk.cu", "tests/cuda_cases.py", "csrc/cuda/new.cu", "CMakeLists.txt"):
        (tree / name).write_text("changed")
        before = runs(tree)
        assert proofs.run("mutants", command("0"), root=tree) == 0
        assert runs(tree) == before + 1


def test_what_is_proven_is_proven_again_while_there_is_time(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # what was never proven runs however late it is
    assert proofs.run("mutants", command("0"), full=True, until=0, root=tree) == 0
    assert runs(tree) == 1
    assert proofs.run("mutants", command("0"), full=True, until=time.time() + 60, root=tree) == 0
    assert runs(tree) == 2
    capsys.readouterr()
    assert proofs.run("mutants", command("0"), full=True, until=time.time() - 1, root=tree) == 0
    assert runs(tree) == 2 and "no time is left" in capsys.readouterr().out


def test_a_failure_is_not_recorded(tree: Path) -> None:
    assert proofs.run("sanitizers", command("raise SystemExit(3)"), root=tree) == 3
    assert proofs.proven(tree) == {}
    assert proofs.run("sanitizers", command("0"), root=tree) == 0
    assert proofs.run("mutants", command("raise SystemExit(3)"), root=tree) == 3
    assert list(proofs.proven(tree)) == ["sanitizers"]


def test_files_changed_meanwhile_are_not_proven(tree: Path) -> None:
    edit = "open('csrc/cuda/topk.cu', 'w').write('meanwhile')"
    assert proofs.run("mutants", command(edit), root=tree) == 0
    assert proofs.proven(tree) == {}


def test_each_best_cpu_is_a_proof_of_its_own(tree: Path) -> None:
    assert proofs.run("ctest:avx2", command("0"), root=tree) == 0
    assert proofs.run("ctest:avx512", command("0"), root=tree) == 0
    assert runs(tree) == 2


def test_a_machine_with_more_tools_proves_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there(*found: str) -> None:
        monkeypatch.setattr(proofs, "tools", lambda *_: sorted(found))

    there("triton")
    assert proofs.run("ptx", command("0"), root=tree) == 0 and runs(tree) == 1
    there("emulator", "triton")
    assert proofs.run("ptx", command("0"), root=tree) == 0 and runs(tree) == 2
    # one that has less neither runs it nor takes its place
    for found in ((), ("triton",), ("emulator",)):
        there(*found)
        assert proofs.run("ptx", command("0"), root=tree) == 0 and runs(tree) == 2
    assert proofs.run("ptx", command("0"), full=True, root=tree) == 0 and runs(tree) == 3
    assert proofs.proven(tree)["ptx"]["tools"] == ["emulator", "triton"]
    (tree / "csrc/cuda/topk.cu").write_text("changed")
    assert proofs.run("ptx", command("0"), root=tree) == 0 and runs(tree) == 4
    assert proofs.proven(tree)["ptx"]["tools"] == ["emulator"]


def test_what_is_no_source_changes_nothing(tree: Path) -> None:
    before = proofs.content_hash(proofs.PROOFS, tree)
    for name in (
        "csrc/cuda/library.so",
        "csrc/notes.md",
        "tests/test_topk.py",
        "build/a.cpp",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("other")
    assert proofs.content_hash(proofs.PROOFS, tree) == before
    (tree / "csrc/cpu/topk.h").rename(tree / "csrc/cpu/other.h")
    assert proofs.content_hash(proofs.PROOFS, tree) != before


@pytest.mark.parametrize("name", proofs.PROOFS)
def test_each_pattern_has_files(name: str) -> None:
    found = [path.as_posix() for path in proofs.files(name)]
    for pattern in set(proofs.PROOFS[name]):
        assert any(fnmatchcase(path, pattern) for path in found), pattern
