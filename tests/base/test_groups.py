"""Tests of one xdist group share a process, and so what a module measures once."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("groups")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has no groups")
def test_a_group_reaches_the_scheduler(request: pytest.FixtureRequest) -> None:
    """By the name that pytest-xdist appends; with pytest 9.2 version 3.8 appends none."""
    assert request.node.nodeid.endswith("@groups")
