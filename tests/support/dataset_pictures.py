"""Encoded pictures for the tests of data sets, and damage for their files."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_losses.datasets import DataError

Image = pytest.importorskip("PIL.Image")


def pixels(number: int, size: tuple[int, int] = (6, 5)) -> Tensor:
    """[3, height, width] uint8, another for every number."""
    return torch.randint(
        0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )


def encode(picture: Tensor, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out, form)
    return out.getvalue()


def png(number: int) -> bytes:
    """`pixels(number)`, without loss."""
    return encode(pixels(number))


def damaged(data: bytes, seed: int) -> bytes:
    """Cut short, or with one to four bytes changed; most changes fall in the first kilobyte."""
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        reach = len(out) if draw.random() < 0.5 else min(len(out), 1024)
        out[draw.randrange(reach)] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    return bytes(out)


def outcome(read: object) -> object:
    """What a reader gives, or "refused" for DataError; every other exception goes through."""
    try:
        return read()
    except DataError as error:
        assert str(error)
        return "refused"


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def two_people(root: Path) -> Path:
    """bo: 3, 4; al: 0, 1, 2 (and a text); an empty folder."""
    for number, name in enumerate(["al/a.png", "al/b.PNG", "al/c.png", "bo/a.png", "bo/b.png"]):
        write(root / name, png(number))
    write(root / "al" / "notes.txt", b"not a picture")
    (root / "empty").mkdir()
    return root


def tar(
    members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **changes: object
) -> bytes:
    """A shard of files; changes: attributes of the last member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=form) as archive:
        for number, (name, data) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if number == len(members) - 1:
                for attribute, value in changes.items():
                    setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_faces(root: Path, people: int = 24, pictures: int = 6) -> Path:
    """Persons are mixtures of some patterns, seen under stronger mixtures of others (the light).

    What tells persons apart is so the same for people never seen, and a network can learn it.
    """
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(12, 1, 6, 5, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, (24, 20), mode="bicubic")[:, 0]
    for person in range(people):
        folder = root / f"p{person}"
        folder.mkdir(parents=True)
        face = torch.randn(8, generator=generator)
        for i in range(pictures):
            light = 2 * torch.randn(4, generator=generator)
            mixture = torch.einsum("k,khw->hw", torch.cat([face, light]), patterns)
            pixels = (mixture * 15 + 112).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root
