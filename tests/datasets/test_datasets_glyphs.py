"""Glyphs: what is a class and what is not, and no font on both sides of a split."""

from __future__ import annotations

import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import drawn_glyphs
import pytest
import torch
from drawn_glyphs import FONTS, LATIN_GREEK_CYRILLIC, characters, copied
from fontTools import ttLib

from fused_losses.datasets import DataError
from fused_losses.datasets.glyphs import (
    Font,
    Glyphs,
    drawing,
    hold_out,
    load_glyphs,
    look_alikes,
)
from fused_losses.datasets.glyphs import cache as cache_file
from fused_losses.datasets.glyphs import fonts as font_files
from fused_losses.datasets.glyphs import load as loading

# fixtures of these tests
cache, fonts, glyphs = drawn_glyphs.cache, drawn_glyphs.fonts, drawn_glyphs.glyphs


@pytest.fixture(scope="module")
def few_fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf")
    return copied(tmp_path_factory.mktemp("few"), *names)


# fonts


def test_fonts_are_found_once_and_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "Sans.ttf").write_bytes((FONTS / "DejaVuSans.ttf").read_bytes())
    (tmp_path / "a" / "notes.txt").write_text("no font")
    assert font_files.find_fonts([tmp_path]) == [tmp_path / "a" / "Sans.ttf"]
    monkeypatch.setenv(font_files.FOLDERS_VARIABLE, f"{tmp_path}{os.pathsep}{tmp_path}/absent")
    folders = font_files.font_folders()
    assert tmp_path in folders and FONTS in folders and tmp_path / "absent" not in folders
    with pytest.raises(ValueError, match="folders: expected folders of fonts"):
        font_files.find_fonts([tmp_path / "absent"])

    # one drawing for every block of Unicode; letters' codes for brackets; mostly private use
    for name in ("LastResortHE-Regular", "cmex10", "STIXNonUni"):
        faces, skipped = font_files.read_faces(FONTS / f"{name}.ttf")
        assert faces == [] and "fewer than 200" in skipped[0].reason
    cut = tmp_path / "cut.ttf"
    cut.write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:3000])
    faces, skipped = font_files.read_faces(cut)
    assert faces == [] and skipped[0].path == cut and "cannot be read" in skipped[0].reason


def test_only_characters_with_a_shape_are_drawn() -> None:
    ((face,), skipped) = font_files.read_faces(FONTS / "DejaVuSans.ttf")
    assert skipped == [] and (face.family, face.style) == ("DejaVu Sans", "Book")
    with ttLib.TTFont(FONTS / "DejaVuSans.ttf") as font:
        assert set(face.shown) < set(font["cmap"].getBestCmap())
    for code in (0x20, 0xA0, 0xAD, 0x200B, 0x300, 0xE000, 0xF6C5):
        assert code not in face.shown
    assert all(unicodedata.category(chr(code))[0] in "LNPS" for code in face.shown)


def test_a_collection_shows_each_glyph_once(tmp_path: Path) -> None:
    collection = ttLib.TTCollection()
    for _ in range(2):
        collection.fonts.append(ttLib.TTFont(FONTS / "DejaVuSansMono.ttf"))
    # the second face shows B for A; the rest is the same
    second = collection.fonts[1]
    for table in second["cmap"].tables:
        if table.isUnicode():
            table.cmap[0x41] = table.cmap[0x42]
    collection.save(tmp_path / "two.ttc")
    (face,), _ = font_files.read_faces(tmp_path / "two.ttc")
    assert face.shown[0x41] == (0, 1) and face.shown[0x43] == (0,)
    drawn = font_files.draw(face.path, [(0x41, 0), (0x41, 1), (0x42, 0)], 32)
    assert drawn.digests[1] == drawn.digests[2] != drawn.digests[0]


def test_drawings_are_whole_and_in_their_place() -> None:
    path = FONTS / "DejaVuSans.ttf"
    # an ideographic full width, a wide ligature, a full stop, a middle dot, a space, a tall bracket
    codes = [ord(c) for c in "HW.· Ǻ|"] + [0xFDFA]
    drawn = font_files.draw(path, [(code, 0) for code in codes], 32)
    assert 0x20 not in drawn.codes and set(drawn.codes) <= set(codes)
    images = torch.frombuffer(bytearray(drawn.images), dtype=torch.uint8).view(-1, 32, 32)
    at = dict(zip(drawn.codes, images, strict=True))
    ink = {code: (image > 0).nonzero() for code, image in at.items()}
    assert all(image.max() > 100 for image in images)
    # the stop stands on the baseline, the dot above it; both are centred
    assert ink[ord(".")][:, 0].max() == 27 and ink[ord("·")][:, 0].max() < 22
    for sign in ".·H|":
        across = ink[ord(sign)][:, 1].float()
        assert abs(float(across.min() + across.max()) / 2 - 15.5) <= 1
    # the same letter, reduced alike: twice the size has four times the ink
    large = font_files.draw(path, [(ord("H"), 0)], 64)
    total = sum(large.images) / 4
    assert abs(int(at[ord("H")].sum()) - total) < 0.02 * total


# what is a class


def test_look_alikes_are_merged_where_most_faces_agree() -> None:
    def merged(*faces: dict[str, int]) -> dict[str, str]:
        rows = [(ord(c), n, d) for n, face in enumerate(faces) for c, d in face.items()]
        found = look_alikes(*(list(column) for column in zip(*rows, strict=True)))
        return {chr(code): chr(root) for code, root in found.items()}

    # equal in one of two faces: merged; in one of three: not
    assert merged({"A": 1, "B": 1}, {"A": 2, "B": 3}) == {"B": "A"}
    assert merged({"A": 1, "B": 1}, {"A": 2, "B": 3}, {"A": 4, "B": 5}) == {}
    # a face that draws only one of them has no say
    assert merged({"A": 1, "B": 1}, {"A": 2}, {"A": 4}, {"B": 6}) == {"B": "A"}
    # chains, and equal pictures of different faces mean nothing here
    assert merged({"A": 1, "B": 1}, {"B": 2, "C": 2}) == {"B": "A", "C": "A"}
    assert merged({"A": 1}, {"B": 1}) == {}


def test_no_picture_has_two_labels(glyphs: Glyphs) -> None:
    pictures = glyphs.read(torch.arange(len(glyphs))).flatten(1)
    assert len(pictures.unique(dim=0)) == len(glyphs) > 3000
    faces = torch.stack([glyphs.labels, glyphs.faces], 1).unique(dim=0)
    assert faces[:, 0].bincount(minlength=glyphs.classes).min() >= 3
    assert glyphs.labels.unique().tolist() == list(range(glyphs.classes))
    # Greek and Cyrillic capitals that are Latin letters in these fonts, and letters that are not
    for same in "ΑАВΒ":
        assert same not in glyphs.names
    assert {"A", "B", "Γ", "Ж", "a", "α"} <= set(glyphs.names)
    assert list(glyphs.names) == sorted(glyphs.names)


def test_pictures_are_read_by_index(glyphs: Glyphs) -> None:
    place = int((glyphs.labels == glyphs.names.index("g")).nonzero()[0])
    font = glyphs.fonts[int(glyphs.faces[place])]
    drawn = font_files.draw(FONTS / font.file, [(ord("g"), 0)], 32)
    found = glyphs.read([place, 0, place])
    assert found.shape == (3, 1, 32, 32) and found.dtype == torch.uint8
    assert found[0].numpy().tobytes() == drawn.images and torch.equal(found[0], found[2])
    assert glyphs.read([]).shape == (0, 1, 32, 32)
    with pytest.raises(IndexError, match=f"got {len(glyphs)}"):
        glyphs.read(torch.tensor([len(glyphs)]))


def test_one_drawing_a_class(glyphs: Glyphs) -> None:
    rows = glyphs.one_a_class()
    assert torch.equal(glyphs.labels[rows], torch.arange(glyphs.classes))
    widest = int(glyphs.faces.bincount().argmax())
    drawn = glyphs.labels[glyphs.faces == widest].unique()
    assert (glyphs.faces[rows][drawn] == widest).all()


# the cache


def test_the_set_is_drawn_once(
    glyphs: Glyphs, fonts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(**changes: object) -> Glyphs:
        options = {"characters": characters(LATIN_GREEK_CYRILLIC), "processes": 1, **changes}
        return load_glyphs([fonts], **options)

    def refuse(*args: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(loading, "_make", refuse)
    again = load()
    assert torch.equal(again.labels, glyphs.labels) and again.names == glyphs.names
    assert again.fonts == glyphs.fonts and again.skipped == glyphs.skipped
    assert torch.equal(again.read([5, 9]), glyphs.read([5, 9]))
    for changes in ({"size": 24}, {"least_fonts": 4}, {"characters": [0x41]}):
        with pytest.raises(AssertionError, match="drawn again"):
            load(**changes)


def test_a_stopped_drawing_leaves_nothing(
    few_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stop)
        load_glyphs([few_fonts], characters=range(0x41, 0x60), cache=tmp_path, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_named(few_fonts: Path, tmp_path: Path) -> None:
    few = {"characters": range(0x41, 0x60), "cache": tmp_path, "processes": 1}
    assert load_glyphs([few_fonts], **few).classes == 31
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"{}\n" + whole, b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=path.name):
            load_glyphs([few_fonts], **few)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fonts", [["f", "f", "f", "x"]]),
        ("fonts", [["f", "f", "f", 1 << 70]]),
        ("fonts", [["f", "f", "f", -1]]),
        ("fonts", [[1, None, [], 0]]),
        ("fonts", ["abcd"]),
        ("fonts", [["f"]]),
        ("skipped", [3]),
        ("drawings", 1e400),
        ("size", [4]),
    ],
)
def test_a_cache_that_says_something_else_is_named(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "x.glyphs"
    whole = {"format": cache_file.FORMAT, "drawings": 1, "size": 4, "fonts": [["f", "f", "f", 0]]}
    for head in (whole | {"skipped": []}, whole | {"skipped": [], key: value}):
        path.write_bytes(json.dumps(head).encode() + b"\n" + b"A" + bytes(23) + bytes(16))
        if head.get(key) != value:
            assert cache_file.read(path).names == ("A",)
            continue
        with pytest.raises(DataError, match=r"x\.glyphs: expected 'fused_losses\.glyphs 1'"):
            cache_file.read(path)


def test_processes_draw_the_same(few_fonts: Path, tmp_path: Path) -> None:
    some = {"characters": range(0x21, 0x100), "size": 16}
    one = load_glyphs([few_fonts], cache=tmp_path / "one", processes=1, **some)
    two = load_glyphs([few_fonts], cache=tmp_path / "two", processes=2, **some)
    assert one.file.path.read_bytes() == two.file.path.read_bytes()


def test_a_font_that_cannot_be_drawn_is_left_out(
    few_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = font_files.draw

    def draw(path: Path, *rest: object) -> font_files.Drawings:
        if path.name == "STIXGeneral.ttf":
            raise OSError("invalid outline")
        return true(path, *rest)

    monkeypatch.setattr(drawing, "draw", draw)
    found = load_glyphs([few_fonts], characters=range(0x41, 0x60), cache=tmp_path, processes=1)
    assert "invalid outline" in {s.path.name: s.reason for s in found.skipped}["STIXGeneral.ttf"]
    used = {found.fonts[i].file for i in found.faces.unique().tolist()}
    assert "STIXGeneral.ttf" not in used and "DejaVuSans.ttf" in used


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"size": 4}, "size: expected 8 to 256, got 4"),
        ({"least_fonts": 0}, "least_fonts: expected 1"),
        ({"characters": [0x4E00]}, "no character is drawn by 3"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict, told: str, few_fonts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        load_glyphs([few_fonts], cache=tmp_path, processes=1, **arguments)
    with pytest.raises(ValueError, match="found no fonts"):
        load_glyphs([tmp_path], cache=tmp_path)


# fonts held out


def test_no_design_is_on_both_sides(glyphs: Glyphs) -> None:
    split = hold_out(glyphs, "STIX")
    assert split.families == ("STIXGeneral",)
    mine = {font.file for font in glyphs.fonts if font.family == "STIXGeneral"}
    assert len(mine) == 4  # its weights and slopes are one design
    assert {glyphs.fonts[i].file for i in split.held_out.faces.unique().tolist()} <= mine
    assert not {glyphs.fonts[i].file for i in split.train.faces.unique().tolist()} & mine
    for part in split[:2]:
        assert part.names == split.train.names and int(part.labels.max()) < part.classes
    assert split.train.labels.bincount(minlength=split.train.classes).min() >= 2
    place = int((split.held_out.labels == split.train.names.index("Q")).nonzero()[0])
    same = (glyphs.images == split.held_out.images[place]).nonzero()[0]
    assert glyphs.names[int(glyphs.labels[same])] == "Q"
    with pytest.raises(ValueError, match="among .*STIXGeneral.*got 'Comic'"):
        hold_out(glyphs, "STIX,Comic")
    with pytest.raises(ValueError, match="expected a held-out design"):
        hold_out(glyphs, "DejaVu,STIX")


def test_the_design_held_out_is_the_widest_that_may_be_spared(glyphs: Glyphs) -> None:
    def chosen(*drawn: tuple[int, range]) -> str:
        """The font held out of fonts that draw these classes, so many times each."""
        labels = [label for times, classes in drawn for label in classes for _ in range(times)]
        faces = [
            face
            for face, (times, classes) in enumerate(drawn)
            for _ in classes
            for _ in range(times)
        ]
        made = replace(
            glyphs,
            images=torch.arange(len(labels)),
            labels=torch.tensor(labels),
            faces=torch.tensor(faces),
            names=tuple("abcdefghijklmnopqrst"),
            fonts=tuple(Font("", name, "", i) for i, name in enumerate("ABCD")),
        )
        (family,) = hold_out(made).families
        return family

    every = range(20)
    assert chosen((2, every), (1, range(9)), (1, range(12)), (2, range(20))) == "A"
    # without A only those of D are left: 10 of 20 classes
    assert chosen((2, every), (1, range(9)), (1, range(12)), (2, range(10))) == "C"
    # more than half of all drawings
    assert chosen((9, every), (1, every), (1, every), (1, range(5))) == "B"
    # every absence leaves less than 0.9 of the classes: the least loss
    assert chosen((2, range(5)), (2, range(5, 9)), (2, range(9, 20)), (1, every)) == "D"


def test_a_font_under_another_name_is_the_same_design(few_fonts: Path, tmp_path: Path) -> None:
    with ttLib.TTFont(FONTS / "STIXGeneral.ttf") as font:
        for record in font["name"].names:
            record.string = "Renamed"
        # some units aside: not one picture need be the same
        for glyph in list(font["glyf"].glyphs):
            shape = font["glyf"][glyph]
            if shape.numberOfContours > 0:
                shape.coordinates.translate((9, 7))
                shape.recalcBounds(font["glyf"])
        font.save(tmp_path / "Renamed.ttf")
    found = load_glyphs(
        [few_fonts, tmp_path], characters=characters("41-17f"), cache=tmp_path, processes=1
    )
    design = {font.file: font.design for font in found.fonts}
    assert design["Renamed.ttf"] == design["STIXGeneral.ttf"]
    assert len({design[f"{name}.ttf"] for name in ("DejaVuSans", "DejaVuSerif", "Renamed")}) == 3
