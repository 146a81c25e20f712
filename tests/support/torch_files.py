"""Files of torch.save with another pickle inside, for tests of what reads them."""

from __future__ import annotations

import zipfile
from pathlib import Path

# {((1, 1), (1, 1)): 1} and so on, 60 deep: its hash takes 2^60 steps
DEEP = (
    b"\x80\x02}K\x01K\x01\x86"
    + b"".join(b"q%ch%c\x86" % (number, number) for number in range(60))
    + b"K\x01s."
)
LONG = b"\x80\x02]" + b"K\x01a" * 1000 + b"."  # of two thousand instructions


def rewritten(path: Path, pickled: bytes, *, packed: bool = False) -> None:
    """Another pickle in an archive of torch.save, with the checksum that it then has."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)
