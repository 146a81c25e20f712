"""`import fused_losses` imports little, and every public name is there when it is asked for."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from places import search_path

import fused_losses
from fused_losses import functional, losses
from fused_losses.base.examples import TABLE

pytestmark = pytest.mark.processes
HEAVY = ("triton", "numpy", "scipy", "matplotlib", "PIL", "fontTools", "pytest")


def child(text: str, *arguments: str) -> list[str]:
    """The words that a process of its own prints, which has imported torch alone."""
    run = subprocess.run(
        [sys.executable, "-c", "import sys, torch\n" + dedent(text), *arguments],
        env={**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


IMPORTED = """
    before = set(sys.modules)
    exec(sys.argv[1])
    print(*sorted(set(sys.modules) - before))
"""


def test_import_brings_few_modules_and_no_others() -> None:
    found = child(IMPORTED, "import fused_losses, fused_losses.functional, fused_losses.losses")
    outside = [name for name in found if name.split(".")[0] in HEAVY]
    assert not outside
    rooms = ["base", "backends", "primitives", "functional", "losses", "explain", "version"]
    rooms += ["warm_up"]
    assert {name.split(".")[1] for name in found if name.startswith("fused_losses.")} <= {*rooms}
    ours = [name for name in found if name.startswith("fused_losses")]
    assert "fused_losses.functional" in ours and len(ours) <= 32


def test_the_table_of_examples_is_whole() -> None:
    text = "from fused_losses.base.examples import TABLE; print('maxsim' in TABLE and len(TABLE))"
    assert int(child(f"import fused_losses\n{text}")[0]) == len(TABLE) > 200


@pytest.mark.parametrize("name", ["info_nce", "margin_softmax", "pairwise_topk"])
def test_a_function_brings_what_it_uses(name: str) -> None:
    found = child(IMPORTED, f"from fused_losses import {name}")
    assert not [m for m in found if m.split(".")[0] in HEAVY]
    above = ("losses", "centers", "metrics", "class_losses", "cli", "bench", "verify")
    assert not [m for m in found if m.startswith(tuple(f"fused_losses.{room}" for room in above))]
    assert len(found) < 100


def test_every_name_is_there_in_any_order() -> None:
    text = """
        import fused_losses as top
        from fused_losses import functional, losses
        for owner in (losses, top, functional):
            listed = set(dir(owner))
            for name in reversed(owner.__all__):
                assert name in listed, name
                assert getattr(owner, name) is vars(owner)[name], name
        for name in set(functional.__all__) & set(top.__all__):
            assert getattr(top, name) is getattr(functional, name), name
        print(len(top.__all__), len(losses.catalogue()))
    """
    assert child(text) == [str(len(fused_losses.__all__)), str(len(losses.catalogue()))]
    assert len(losses.catalogue()) > 100


def test_star_and_rooms() -> None:
    text = """
        import fused_losses
        assert fused_losses.centers.all_rows and fused_losses.similarity and fused_losses.mining
        from fused_losses import *
        assert callable(info_nce) and callable(explain) and ClassCenters and losses.CircleLoss
        import fused_losses.explain
        assert callable(fused_losses.explain)
        print("ok")
    """
    assert child(text) == ["ok"]


def test_nothing_warns_where_there_is_no_numpy() -> None:
    text = """
        import warnings
        sys.modules["numpy"] = None  # torch itself has warned, at its import
        warnings.simplefilter("error")
        from fused_losses import *
        x = torch.randn(8, 4, requires_grad=True)
        labels = torch.arange(8) // 2
        with use_backend("bounded"):
            (info_nce(x, x) + losses.CircleLoss()(x, labels)).backward()
            margin_softmax(x, torch.randn(5, 4), labels).backward()
            print(explain(info_nce, x, x).backend)
    """
    assert child(text) == ["bounded"]


@pytest.mark.parametrize("owner", [fused_losses, functional, losses], ids=lambda m: m.__name__)
def test_no_other_name_is_there(owner) -> None:
    with pytest.raises(AttributeError, match=f"module '{owner.__name__}' has no attribute 'cirle'"):
        _ = owner.cirle
    # what some results are made of is named in `functional` alone
    assert not hasattr(fused_losses, "Clusters") and hasattr(functional, "Clusters")


def test_ops_are_found_by_their_names() -> None:
    text = """
        names = lambda: {n for n in torch._C._dispatch_get_all_op_names() if "fused_losses" in n}
        import fused_losses
        print(len(names()), hasattr(torch.ops.fused_losses, "nonsense"))
        by_name = names()
        from fused_losses import *
        assert names() == by_name
        op = torch.ops.fused_losses.pair_statistics_bounded
        print(op.__module__, type(torch.ops.fused_losses).__module__)
    """
    none, nonsense, module, namespace = child(text)
    assert (none, nonsense) == ("0", "False")
    assert (module, namespace) == ("torch._ops.fused_losses", "torch._ops")
    found = child(
        "import fused_losses; print(torch.ops.fused_losses.maxsim_bounded.default._schema.name)"
    )
    assert found == ["fused_losses::maxsim_bounded"]


def test_first_use_within_compiled_code() -> None:
    text = """
        import fused_losses
        def step(x, y):
            scores = fused_losses.functional.maxsim(x[None], y[None])
            return fused_losses.info_nce(x, y) + scores.sum()
        x, y = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
        assert "fused_losses.functions.info_nce" not in sys.modules
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(x, y)
        torch.testing.assert_close(compiled, step(x, y))
        print("ok")
    """
    assert child(text) == ["ok"]


def test_first_use_within_a_fake_mode_and_threads() -> None:
    text = """
        import threading
        from torch._subclasses.fake_tensor import FakeTensorMode
        import fused_losses
        with FakeTensorMode():
            fused_losses.info_nce(torch.ones(4, 2), torch.ones(4, 2))
        names, found = fused_losses.functional.__all__, []
        ask = lambda: found.append([getattr(fused_losses.functional, name) for name in names])
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert len(found) == 8 and all(f == found[0] for f in found)
        x = torch.randn(4, 2)
        print(type(fused_losses.info_nce(x, x)).__name__)
    """
    assert child(text) == ["Tensor"]


def test_pickles_find_their_modules() -> None:
    made = (fused_losses.info_nce, losses.CircleLoss(m=0.25), fused_losses.margins.ArcFace(0.3))
    text = """
        import pickle
        function, module, margin = pickle.loads(bytes.fromhex(sys.argv[1]))
        print(function.__name__, module.m, margin.margin)
    """
    assert child(text, pickle.dumps(made).hex()) == ["info_nce", "0.25", "0.3"]


def test_an_exported_program_needs_the_import_alone(tmp_path) -> None:
    class Scores(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return fused_losses.maxsim(x, y)

    x, y = torch.randn(2, 3, 4), torch.randn(5, 6, 4)
    torch.export.save(torch.export.export(Scores(), (x, y)), tmp_path / "scores.pt2")
    torch.save((x, y, Scores()(x, y)), tmp_path / "told.pt")
    text = """
        import fused_losses
        assert "fused_losses.primitives.maxsim.op" not in sys.modules
        program = torch.export.load(sys.argv[1] + "/scores.pt2")
        x, y, told = torch.load(sys.argv[1] + "/told.pt")
        assert torch.equal(program.module()(x, y), told)
        print("ok")
    """
    assert child(text, str(tmp_path)) == ["ok"]
