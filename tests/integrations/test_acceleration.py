"""Putting methods in the place of a peer's: reversible, nested, told; without any peer."""

from __future__ import annotations

import re
import threading
from typing import Any

import places
import pytest
import torch
from torch import nn

from fused_losses import integrations
from fused_losses.integrations.acceleration import NotCovered, Peer, PeerCall, PeerRow, begin


def halved(call: PeerCall, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise NotCovered(f"{x.dtype}")
    return call.original(module, x) / 2


# Dropout1d inherits its extra_repr
TABLE = Peer(
    "torch",
    "torch",
    (torch.__version__.split(".")[0],),
    (
        PeerRow("nn.Identity", "forward", halved, "half"),
        PeerRow("nn.Dropout1d", "extra_repr", lambda call, m: "ours", "a word"),
    ),
    {},
)
OPTIONS: dict[str, Any] = dict(strict=False, any_version=False, backend=None)


def test_methods_are_replaced_and_restored() -> None:
    own = vars(nn.Identity)["forward"]
    x = torch.ones(2)
    with begin(TABLE, **OPTIONS) as acceleration:
        assert nn.Identity()(x).tolist() == [0.5, 0.5]
        assert nn.Identity()(x.double()).tolist() == [1, 1]
        # an inherited method is replaced in the class of the table alone
        assert repr(nn.Dropout1d()) == "Dropout1d(ours)" and "ours" not in repr(nn.Dropout())
        told = {ran.name: ran for ran in acceleration.report()}
    assert told["Identity"] == ("Identity", 1, {"torch.float64": 1})
    assert str(told["Identity"]) == "Identity: 1 accelerated; 1 by the peer: torch.float64"
    assert vars(nn.Identity)["forward"] is own and "extra_repr" not in vars(nn.Dropout1d)
    assert repr(acceleration) == "<Acceleration of torch, undone>"


def test_strict_raises_with_the_reason() -> None:
    with (
        begin(TABLE, **{**OPTIONS, "strict": True}),
        pytest.raises(RuntimeError, match=r"torch\.nn\.Identity\.forward: .*torch.float64"),
    ):
        nn.Identity()(torch.ones(2, dtype=torch.float64))


def test_accelerations_overlap() -> None:
    first, second = begin(TABLE, **OPTIONS), begin(TABLE, **OPTIONS)
    x = torch.ones(1)
    assert nn.Identity()(x).item() == 0.5
    first.undo()
    assert nn.Identity()(x).item() == 0.5 and second.report()[0].accelerated == 2
    assert first.report()[0].accelerated == 1
    second.undo()
    second.undo()
    assert nn.Identity()(x).item() == 1


def test_what_somebody_put_over_it_stays() -> None:
    acceleration = begin(TABLE, **OPTIONS)
    below = nn.Identity.forward
    other = lambda self, x: below(self, x) + 1
    own = acceleration.peer.rows[0]
    try:
        nn.Identity.forward = other
        assert nn.Identity()(torch.ones(1)).item() == 1.5
        acceleration.undo()
        assert nn.Identity.forward is other and own.name == "Identity"
        assert nn.Identity()(torch.ones(1)).item() == 2
    finally:
        nn.Identity.forward = below.__wrapped__


def test_threads_begin_and_end_at_will() -> None:
    own = vars(nn.Identity)["forward"]
    found: list[float] = []

    def work() -> None:
        for _ in range(200):
            with begin(TABLE, **OPTIONS):
                found.append(nn.Identity()(torch.ones(1)).item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0.5] * 800 and vars(nn.Identity)["forward"] is own


def test_a_missing_or_untested_peer_is_named() -> None:
    missing = TABLE._replace(package="no_such_package", distribution="no-such", versions=("2.9",))
    with pytest.raises(ImportError, match=r"no-such \(2\.9\).*no_such_package"):
        begin(missing, **OPTIONS)
    old = TABLE._replace(versions=("0.1",))
    with pytest.raises(
        RuntimeError, match=rf"expected torch 0\.1, got {re.escape(torch.__version__)}"
    ):
        begin(old, **OPTIONS)
    begin(old, **{**OPTIONS, "any_version": True}).undo()
    with pytest.raises(ValueError, match="peer: expected one of"):
        integrations.accelerate("numpy")


@pytest.mark.parametrize("peer", integrations.PEERS)
def test_the_documents_have_the_table(peer: str) -> None:
    table = integrations.table(peer)
    told = (places.ROOT / "docs" / "integrations.md").read_text()
    for row in table.rows:
        leaves = row.leaves or "nothing"
        assert f"| `{row.name}` | `{row.runs_on}` | {leaves} |" in told, row.name
    for name, why in table.left.items():
        assert f"| `{name.rpartition('.')[2]}` | {why} |" in told, name
    assert " or ".join(table.versions) in told
