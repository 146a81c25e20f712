"""A run's configuration is a frozen dataclass whose fields are the options of its command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

MARGINS = (
    "arcface",
    "cosface",
    "sphereface",
    "adaface",
    "magface",
    "elastic-arcface",
    "elastic-cosface",
    "curricularface",
    "mv-softmax",
    "none",
)
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "bounded")
PRECISIONS = ("fp32", "tf32", "mixed", "bf16")
SCHEDULES = ("cosine", "linear", "constant")
AUGMENTATIONS = ("none", "light", "full")


class Config:
    """Base of a run's dataclass; each declares these fields in its own place of --help."""

    steps: int
    warmup: float
    schedule: str
    device: str
    threads: int
    checkpoint_every: int
    # fields that change no loss, so that a run may go on with others
    MAY_DIFFER: ClassVar[frozenset[str]]

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.from_json(path.read_text())

    def with_changes(self, **changes: Any) -> Self:
        return type(self)(**{**vars(self), **changes})


def differences(saved: Config, asked: Config) -> list[str]:
    """What keeps `asked` from continuing `saved`, one sentence a field."""
    told = vars(asked)
    return [
        f"{name}: the run has {had!r}, asked for {told[name]!r}"
        for name, had in vars(saved).items()
        if name not in saved.MAY_DIFFER and had != told[name]
    ]


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field that carries its own --help text."""
    return field(default=default, metadata={"help": text, "choices": choices})


def check_choices(config: Any) -> None:
    """ValueError for a field whose value is none of its choices."""
    for f in fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if choices and value not in choices:
            raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {value!r}")


def check_least(config: Config, **least: float) -> None:
    """ValueError for a field below its least value."""
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"{name}: expected at least {low}, got {getattr(config, name)}")


def check_warmup(config: Config) -> None:
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"warmup: expected a share from 0 to 1, got {config.warmup}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """The dictionary that an option says in JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, got {text!r}")
    return value


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
