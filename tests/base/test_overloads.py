"""The forms that type checkers see of functions whose result a flag chooses are those that run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_overloads, get_type_hints

import pytest

from fused_losses import functional, metrics

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: found
    for room in (functional, metrics)
    for name in room.__all__
    if inspect.isfunction(found := getattr(room, name)) and get_overloads(found)
}


def keywords(form: Callable[..., Any]) -> dict[str, Any]:
    """The types of a form's arguments, those of its options among them."""
    told = get_type_hints(form)
    told.pop("return")
    options = told.pop("options", None)
    return told | (get_type_hints(get_args(options)[0]) if options is not None else {})


def test_functions_with_several_results_have_forms() -> None:
    assert set(FUNCTIONS) >= {
        "margin_softmax",
        "logsumexp_similarity",
        "similarity_attention",
        "dir_at_far",
        "all_pairs_tar_at_far",
        "tar_at_far",
    }
    for room in (functional, metrics):
        for name in room.__all__:
            found = getattr(room, name)
            if inspect.isfunction(found) and name not in FUNCTIONS:
                answer = str(inspect.signature(found).return_annotation)
                assert " | tuple[" not in answer and " | dict[" not in answer, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forms_have_the_arguments_of_what_runs(name: str) -> None:
    function = FUNCTIONS[name]
    runs = inspect.signature(function).parameters
    hints = get_type_hints(inspect.unwrap(function))
    flags = set()
    for form in get_overloads(function):
        told = keywords(form)
        assert set(told) == set(runs)
        flags |= {key for key in told if told[key] != hints[key]}
        for key, parameter in inspect.signature(form).parameters.items():
            if key == "options":
                continue
            assert parameter.kind == runs[key].kind
            # a default is told where the flag's type has it
            assert parameter.default in (inspect.Parameter.empty, runs[key].default)
    # what chooses the result, and nothing else, has a type of its own in a form
    assert len(flags) in (1, 2)
