"""A run's configuration is a frozen dataclass whose fields are the options of its command line."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_type_hints

from fused_losses.train.frame.files import RunFileError, read_json

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


class OptionError(ValueError):
    """A value that a run cannot have; the text begins with the field's name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text = name, text

    def flag(self) -> str:
        """The same, as the command line names the field."""
        return f"--{self.name.replace('_', '-')}: {self.text}"


class Config:
    """Base of a run's dataclass; each declares these fields in its own place of --help."""

    steps: int
    warmup: float
    schedule: str
    device: str
    threads: int
    checkpoint_every: int
    tensorboard: bool
    # fields that change no loss, so that a run may go on with others
    MAY_DIFFER: ClassVar[frozenset[str]]
    # numbers that a run may go on with larger ones of
    MAY_GROW: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        """OptionError for a field whose value has the wrong type or lies outside its range."""
        kinds = get_type_hints(type(self))
        for f in options_of(type(self)):
            _check(f.name, getattr(self, f.name), kinds[f.name], f.metadata)

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """The configuration that a run's folder records; `RunFileError` where it is damaged."""
        told = read_json(path)
        if not isinstance(told, dict):
            raise RunFileError(f"{path}: expected a JSON object, got {type(told).__name__}")
        names = {f.name for f in options_of(cls)}
        unknown, missing = sorted({*told} - names), sorted(names - {*told} - cls.MAY_DIFFER)
        if unknown or missing:
            raise RunFileError(
                f"{path}: not the fields of a {cls.__name__}; unknown: "
                f"{', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
            )
        try:
            return cls(**told)
        except ValueError as error:
            raise RunFileError(f"{path}: {error}") from error

    def code(self) -> dict[str, Any]:
        """The fields that name code of others', which a run imports, and what it is called with."""
        return {}

    def with_changes(self, **changes: Any) -> Self:
        return type(self)(**{**vars(self), **changes})


def options_of(kind: type) -> tuple[Field[Any], ...]:
    """The fields of a run's dataclass, in the order of --help."""
    return fields(kind)


def differences(saved: Config, asked: Config) -> list[str]:
    """What keeps `asked` from continuing `saved`, one sentence a field."""
    told = vars(asked)
    return [
        f"{name}: the run has {had!r}, asked for {told[name]!r}"
        for name, had in vars(saved).items()
        if name not in saved.MAY_DIFFER
        and had != told[name]
        and not (name in saved.MAY_GROW and told[name] > had)
    ]


def check_code(saved: Config, given: Mapping[str, Any], path: Path, otherwise: str) -> None:
    """OptionError where a configuration read from a file names code that the user did not name."""
    named = saved.code()
    # other values than the run's are refused where the two are compared, before any import
    unsaid = [name for name in named if name not in given]
    if unsaid:
        text = f"{path} has {named[unsaid[0]]!r}, and what it names is imported and called; "
        again = shlex.join(words(named))
        raise OptionError(unsaid[0], f"{text}to confirm that, say {again} or {otherwise}")


def words(named: Mapping[str, Any]) -> list[str]:
    """Fields as the command line says them."""
    return [word for name, v in named.items() for word in (f"--{name.replace('_', '-')}", str(v))]


def option(
    default: Any,
    text: str,
    choices: tuple[Any, ...] | None = None,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """A field that carries its own --help text, and the range of its numbers (all finite)."""
    metadata = {"help": text, "choices": choices, "least": least, "above": above, "most": most}
    return field(default=default, metadata=metadata)


MOST = 1e30  # of rates and scales: float32 has room for it, and for what optimisers make of it
MOST_THREADS = 1024  # a process that asks for more than its system has is ended by OpenMP
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
MOST_INTEGER = 2**63 - 1


def _check(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    allowed = get_args(hint) or (hint,)
    if NoneType in allowed and value is None:
        return
    kind = allowed[0]
    # an integer is a number; True is neither
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise OptionError(name, f"expected {KINDS[kind]}, got {value!r}")
    choices = metadata["choices"]
    if choices and value not in choices:
        raise OptionError(name, f"expected one of {', '.join(map(str, choices))}, got {value!r}")
    if not isinstance(value, int | float):
        return
    least, above, most = metadata["least"], metadata["above"], metadata["most"]
    # beyond these torch takes no integer, and a float has no room for one
    if isinstance(value, int) and not -MOST_INTEGER <= value <= MOST_INTEGER:
        raise OptionError(name, f"expected an integer of 64 bits, got {value}")
    if not (math.isfinite(value) and least <= value <= most and value > above):
        raise OptionError(name, f"expected {_range(least, above, most)}, got {value}")


def _range(least: float, above: float, most: float) -> str:
    low = f"more than {above:g}" if above > -math.inf else f"at least {least:g}"
    if most == math.inf:
        return "a finite number" if max(least, above) == -math.inf else low
    if above > -math.inf:
        return f"{low} and at most {most:g}"
    return f"{least:g} to {most:g}" if least > -math.inf else f"at most {most:g}"


def json_object(name: str, text: str) -> dict[str, Any]:
    """The dictionary that an option says in JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(name, f"expected a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise OptionError(name, f"expected a JSON object, got {text!r}")
    return value


def add_options(parser: argparse._ArgumentGroup, kind: type) -> None:
    """Field `a_b` of the dataclass as option `--a-b`; what is not said stays out of the result."""
    for f in options_of(kind):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"]
        # SUPPRESS: what the user did not say must not override the run that is resumed
        if isinstance(f.default, bool):
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{text} (default: {'yes' if f.default else 'no'})",
            )
            continue
        value: Callable[[str], Any] = float if f.default is None else type(f.default)
        # an empty or absent value means what its text says of the default
        told = text if "default:" in text else f"{text} (default: {f.default})"
        parser.add_argument(
            flag,
            type=value,
            choices=f.metadata["choices"],
            default=argparse.SUPPRESS,
            help=told.replace("%", "%%"),
        )


def given_options(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields that the command line set."""
    return {f.name: getattr(args, f.name) for f in options_of(kind) if hasattr(args, f.name)}
