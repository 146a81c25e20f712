"""An op's NamedTuples stand in the order of its schema: they are made of flat arguments."""

from __future__ import annotations

import pytest

from fused_losses.primitives.class_rules.inputs import ClassInputs, ClassNeeds
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.divergence.inputs import DivergenceInputs, DivergenceNeeds
from fused_losses.primitives.divergence.op import DIVERGENCE
from fused_losses.primitives.listed.inputs import ListedInputs
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.nested.inputs import NestedInputs, NestedNeeds
from fused_losses.primitives.op import OPS
from fused_losses.primitives.pairs.inputs import BEFORE, PairInputs, PairNeeds
from fused_losses.primitives.row_rules.inputs import RowInputs, RowNeeds
from fused_losses.primitives.row_statistics.inputs import (
    Inputs,
    Needs,
    RowGradients,
    backward_arguments,
)
from fused_losses.primitives.shared_negatives.inputs import SharedInputs
from fused_losses.primitives.topk.inputs import TopkInputs

# where the inputs begin: of the forward, of the backward
TUPLES = {
    "pair_statistics": (PairInputs, PairNeeds, BEFORE["pair_statistics"], 5),
    "pair_attention": (PairInputs, PairNeeds, BEFORE["pair_attention"], 5),
    "distance_matrix": (DistanceInputs, DistanceNeeds, 0, 2),
    "row_losses": (RowInputs, RowNeeds, 0, 1),
    "class_rules": (ClassInputs, ClassNeeds, 0, 4),
    DIVERGENCE.name: (DivergenceInputs, DivergenceNeeds, 0, 5),
    "pair_topk": (TopkInputs, None, 0, None),
    "shared_negatives": (SharedInputs, None, 0, 1),
    "listed_scores": (ListedInputs, None, 0, 1),
    "nested_statistics": (NestedInputs, NestedNeeds, 0, 4),
}


def names(op: str, direction: str = "") -> tuple[str, ...]:
    return tuple(a.name for a in OPS[op].op("bounded", direction)._schema.arguments)


@pytest.mark.parametrize("op", TUPLES)
def test_fields_are_the_schemas_arguments(op: str) -> None:
    inputs, needs, first, further = TUPLES[op]
    fields = inputs._fields
    assert names(op)[first : first + len(fields)] == fields
    if further is not None:
        assert names(op, "_backward")[further : further + len(fields)] == fields
    if needs is not None:
        last = tuple(f if f == "compact" else f"need_{f}" for f in needs._fields)
        assert names(op, "_backward")[-len(last) :] == last


def test_maxsim_fields_are_the_schemas_arguments() -> None:
    # its gradient rounds nothing: no precision
    assert names("maxsim") == MaxsimInputs._fields
    assert names("maxsim", "_backward")[2:6] == MaxsimInputs._fields[:4]
    needs = tuple(f"need_{f}" for f in MaxsimNeeds._fields)
    assert names("maxsim", "_backward")[6:] == needs


def test_row_statistics_fields_are_the_schemas_arguments() -> None:
    assert names("row_statistics")[:-1] == Inputs._fields
    # what the forward gave stands amid the inputs
    p, lse, kept, grads, needs = backward_arguments(names("row_statistics", "_backward"))
    assert p == Inputs(*Inputs._fields) and (lse, kept) == ("lse", "kept")
    assert grads == RowGradients(*(f"grad_{f}" for f in RowGradients._fields))
    assert needs == Needs("need_x", "need_weight", "need_bias", "compact")


def test_every_op_with_a_tuple_is_here() -> None:
    flat = {"class_targets", "listed_pairs"}  # a handful of arguments
    assert {*TUPLES, "maxsim", "row_statistics", *flat} == set(OPS)
