"""What the package imports, and where something could run code of a file or of another process.

The list is the page's (docs/reliability.md, "Dependencies and pickles"): what is found in the
sources and is not in it, or the other way round, fails.
"""

from __future__ import annotations

import ast
import re
import sys

import pytest
from places import ROOT

PACKAGE = ROOT / "fused_losses"
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
# modules and functions that execute pickles, text, or modules by name
EXECUTES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("eval", "exec", "Unpickler", "FileSystemReader", "state_dict_loader"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("recv_object_list", "multiprocessing", "ProcessPoolExecutor", "import_module"),
}
# where they are, and no other file has any
WHERE = {
    "centers/checkpoint.py": {"FileSystemReader", "broadcast_object_list", "state_dict_loader"},
    "centers/collectives.py": {"all_gather_object"},
    "centers/watch.py": {"broadcast_object_list"},
    # the package's own modules, and peers that are named in its own tables
    "backends/__init__.py": {"import_module"},
    "backends/triton/launch.py": {"import_module"},
    "base/compiled.py": {"import_module"},
    "base/late.py": {"import_module"},
    "bench/micro/batch_cases.py": {"import_module"},
    "bench/micro/peers.py": {"import_module"},
    "integrations/__init__.py": {"import_module"},
    "integrations/acceleration.py": {"import_module"},
    "integrations/pytorch_metric_learning/triplets.py": {"import_module"},
    "train/faces/backbone.py": {"import_module"},
    "verify/forms.py": {"import_module"},
    "datasets/glyphs/drawing.py": {"ProcessPoolExecutor", "multiprocessing"},
    "train/large/cli.py": {"multiprocessing"},
    "train/large/group.py": {"broadcast_object_list"},
}
# files of torch.save are read by the reader that runs nothing
READS = {"centers/insightface_files.py", "train/frame/checkpoint.py"}
REQUIRED = {"torch", "triton"}
OPTIONAL = {"PIL", "fontTools", "matplotlib", "sentence_transformers"}
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def executes(text: str) -> set[str]:
    """The names of EXECUTES in a source: imported, called as they are, or as a module's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.Attribute) and node.attr not in ("eval", "exec"):
            found.add(node.attr)
    return found & EXECUTES


def loads(text: str) -> list[bool]:
    """Of each call of torch.load, whether it says that it runs nothing."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loading = [call for call in calls if ast.unparse(call.func) in ("torch.load", "load_file")]
    return [
        any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
        for call in loading
    ]


def imported(text: str) -> set[str]:
    """The packages of others that a source imports by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"fused_losses"}


def test_pickles_are_executed_where_the_page_says() -> None:
    found = {name: executes(path.read_text()) for name, path in SOURCES.items()}
    assert {name: names for name, names in found.items() if names} == WHERE
    for name, names in WHERE.items():
        own = names == {"import_module"} and not name.startswith("train/")
        assert own or f"`{name}`" in PAGE, name


def test_torch_load_runs_no_code() -> None:
    found = {name: loads(path.read_text()) for name, path in SOURCES.items()}
    assert {name for name, calls in found.items() if calls} == READS
    assert all(all(calls) for calls in found.values())
    for name in READS:
        assert f"`{name}`" in PAGE, name


def test_other_packages_are_those_of_the_page() -> None:
    found = {name for path in SOURCES.values() for name in imported(path.read_text())}
    assert found == REQUIRED | OPTIONAL
    section = PAGE.partition("## Dependencies and pickles")[2].partition("\n## ")[0]
    for name in REQUIRED | {"Pillow", "fontTools", "matplotlib", "sentence-transformers"}:
        assert name in section, name


def test_what_the_tests_run_with_is_pinned() -> None:
    lines = (ROOT / "requirements-tested.txt").read_text().splitlines()
    for line in (line for line in lines if line and not line.startswith("#")):
        assert re.match(r"[\w.-]+(\[[\w,]+\])?==[\w.]+(;|$)", line), line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle", {"pickle"}),
        ("from pickle import loads", {"pickle"}),
        ("import torch.multiprocessing as mp", {"multiprocessing"}),
        ("import torch.distributed as d\nd.all_gather_object(a, b)", {"all_gather_object"}),
        ("eval('1')", {"eval"}),
        ("net.eval()", set()),
    ],
)
def test_each_is_seen(text: str, found: set[str]) -> None:
    # the control
    assert executes(text) == found
    assert loads("torch.load(f)\ntorch.load(f, weights_only=True)") == [False, True]
