"""Folders of pictures, decoding, and the files that all readers share."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from dataset_pictures import damaged, encode, outcome, pixels, png, two_people, write

from fused_losses.datasets import DataError, ImageFolders
from fused_losses.datasets.decoding import decode_picture
from fused_losses.datasets.files import OpenFiles, StoredFile, stamp
from fused_losses.train.faces.data import image_folder, read_picture


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    return two_people(tmp_path / "faces")


def test_folders_are_classes_in_the_order_of_names(faces: Path) -> None:
    found = ImageFolders(faces, size=(6, 5))
    assert found.names == ["al", "bo"] and found.classes == 2 and len(found) == 5
    assert found.labels.tolist() == [0, 0, 0, 1, 1] and found.labels.dtype == torch.int64
    assert found.read([4, 0, 2]).equal(torch.stack([pixels(4), pixels(0), pixels(2)]))
    assert found.read(torch.tensor([1])).equal(pixels(1)[None])
    assert found.read([]).shape == (0, 3, 6, 5)


def test_nothing_hidden_counts_in_either_reader(tmp_path: Path) -> None:
    names = ["a/x.gif", "a/y.PNG", "b/x.jpg", "c/d.tiff", "d/x.webp", "e/x.bmp", "f/x.ppm"]
    hidden = ["a/._x.jpg", ".ipynb_checkpoints/x-checkpoint.png", ".x.png", "b/.jpg", "b/.d/x.png"]
    for name in names:
        form = {"JPG": "JPEG"}.get(name[-3:].upper(), Path(name).suffix[1:].upper())
        write(tmp_path / name, encode(pixels(0), form))
    for name in hidden:
        write(tmp_path / name, b"no picture")
    # neither is a folder, whatever its name
    (tmp_path / "a" / "z.png").mkdir()
    found = ImageFolders(tmp_path, size=4)
    assert [str(found.path(i).relative_to(tmp_path)) for i in range(len(found))] == names
    assert image_folder(tmp_path, (4, 4), 3).images.equal(found.read(range(7)))
    # a link to nowhere is a picture that is missing
    (tmp_path / "b" / "y.png").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"b/y\.png: cannot be opened"):
        ImageFolders(tmp_path, size=4).read([3])


def test_pictures_are_resized_by_averages_and_made_grey(tmp_path: Path) -> None:
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    picture[:, :2] = 100
    picture[:, :, :2] += 60
    write(tmp_path / "a" / "x.png", encode(picture))
    assert ImageFolders(tmp_path, size=2).read([0])[0, 0].tolist() == [[160, 100], [60, 0]]
    grey = ImageFolders(tmp_path, size=(1, 2), channels=1).read([0])
    assert grey.tolist() == [[[[110, 50]]]]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
def test_every_named_format_is_read(form: str) -> None:
    flat = torch.full((3, 8, 8), 130, dtype=torch.uint8)
    found = decode_picture(encode(flat, form), (4, 4), 3, "x")
    assert found.shape == (3, 4, 4) and found.dtype == torch.uint8 and found.is_contiguous()
    assert (found.int() - 130).abs().max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_trainers_reader_gives_the_same_pixels(faces: Path, channels: int) -> None:
    found = ImageFolders(faces, size=(4, 3), channels=channels)
    wanted = [read_picture(found.path(i), (4, 3), channels) for i in range(5)]
    assert found.read(range(5)).equal(torch.stack(wanted))


def test_a_picture_that_cannot_be_read_names_itself(faces: Path) -> None:
    write(faces / "bo" / "a.png", png(3)[:40])
    found = ImageFolders(faces, size=4)
    assert found.read([0, 4]).shape == (2, 3, 4, 4)
    with pytest.raises(DataError, match=r"bo/a\.png: not a picture that can be read"):
        found.read([3])
    (faces / "bo" / "b.png").unlink()
    with pytest.raises(DataError, match=r"bo/b\.png: cannot be opened \(No such file"):
        found.read([4])


def test_formats_that_run_programs_and_huge_pictures_are_refused() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="x: not a picture that can be read"):
        decode_picture(eps, (4, 4), 3, "x")
    # Pillow reads this one, but it is none of the formats named
    with pytest.raises(DataError, match="x: not a picture that can be read"):
        decode_picture(encode(pixels(0), "PCX"), (4, 4), 3, "x")
    header = struct.pack(">IIBBBBB", 1 << 14, (1 << 12) + 1, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(DataError, match=f"x: expected .* at most {1 << 26} pixels, got 16384 x"):
        decode_picture(b"\x89PNG\r\n\x1a\n" + data + b"\0\0\0\0IDAT\0\0\0\0", (4, 4), 3, "x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_damaged_pictures_give_an_error_or_pixels(form: str) -> None:
    data = encode(pixels(1, (24, 20)), form)
    refused = 0
    for seed in range(60):
        broken = damaged(data, seed)
        found = outcome(lambda broken=broken: decode_picture(broken, (4, 4), 3, "x"))
        refused += isinstance(found, str)
        assert isinstance(found, str) or found.shape == (3, 4, 4)
    assert refused >= 10


def test_bad_arguments(faces: Path, tmp_path: Path) -> None:
    found = ImageFolders(faces, size=4)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=rf"indices: expected values in \[0, 5\), got {index}"):
            found.read([0, index])
    with pytest.raises(TypeError, match="indices: expected .* integers, got shape"):
        found.read(torch.tensor([0.0]))
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        found.read([0.5])
    with pytest.raises(ValueError, match="channels: expected 1 .* or 3 .*, got 4"):
        ImageFolders(faces, size=4, channels=4)
    with pytest.raises(ValueError, match="size: expected sides of 1 to .*, got 0"):
        ImageFolders(faces, size=0)
    with pytest.raises(TypeError, match="size: expected an integer or"):
        ImageFolders(faces, size="4")
    with pytest.raises(DataError, match="nowhere: expected a folder"):
        ImageFolders(tmp_path / "nowhere", size=4)
    with pytest.raises(DataError, match=r"empty: expected folders with pictures .*, got none"):
        ImageFolders(faces / "empty", size=4)


# ---- files --------------------------------------------------------------------------------------


def test_reads_past_the_end_and_files_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "f", bytes(range(100)))
    file = StoredFile(path)
    assert file.read(90, 10, "x") == bytes(range(90, 100)) and file.read(100, 0, "x") == b""
    for offset, length in ((91, 10), (-1, 2), (5, -1), (1 << 70, 1)):
        with pytest.raises(DataError, match=f"f: x: expected {length} bytes at offset {offset}"):
            file.read(offset, length, "x")
    os.truncate(path, 50)
    with pytest.raises(DataError, match="f: x: the file was cut short to 50 bytes"):
        file.read(40, 20, "x")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(DataError, match="expected a regular file"):
            StoredFile(tmp_path / name)


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(i), bytes([i])) for i in range(9)]
    stamps = {path: stamp(os.stat(path)) for path in paths}
    files, before = OpenFiles(stamps, limit=3), len(os.listdir("/proc/self/fd"))
    held = files.get(paths[0])
    for i in list(range(9)) * 2:
        assert files.get(paths[i]).read(0, 1, "x") == bytes([i])
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    # one that was put away is open for who holds it
    assert held.read(0, 1, "x") == b"\0"
