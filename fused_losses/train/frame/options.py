"""A run's configuration is a frozen dataclass whose fields are the options of its command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field that carries its own --help text."""
    return field(default=default, metadata={"help": text, "choices": choices})


def check_choices(config: Any) -> None:
    """ValueError for a field whose value is none of its choices."""
    for f in fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if choices and value not in choices:
            raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {value!r}")


def check_least(config: Any, **least: float) -> None:
    """ValueError for a field below its least value."""
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(config, name)}")


def add_options(parser: argparse._ArgumentGroup, kind: type) -> None:
    """Field `a_b` of the dataclass as option `--a-b`; what is not said stays out of the result."""
    for f in fields(kind):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        # SUPPRESS: what the user did not say must not override the run that is resumed
        if isinstance(f.default, bool):
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
            continue
        value: Callable[[str], Any] = float if f.default is None else type(f.default)
        parser.add_argument(
            flag,
            type=value,
            choices=f.metadata["choices"],
            default=argparse.SUPPRESS,
            help=f"{text} (default: {f.default})" if f.default not in (None, "") else text,
        )


def given_options(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields that the command line set."""
    return {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
