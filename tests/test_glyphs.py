"""Glyphs: what is a class and what is not, no font on both sides, and a recipe that learns them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL.Image", reason="drawing needs Pillow")
ttLib = pytest.importorskip("fontTools.ttLib", reason="reading fonts needs fontTools")
matplotlib = pytest.importorskip("matplotlib", reason="its fonts are always the same")

from fused_losses.datasets import DataError  # noqa: E402
from fused_losses.datasets.glyphs import Font, Glyphs, hold_out, load_glyphs, look_alikes  # noqa: E402
from fused_losses.datasets.glyphs import fonts as glyph_fonts  # noqa: E402
from fused_losses.datasets.glyphs import load as glyph_sets  # noqa: E402
from fused_losses.train import Interrupted  # noqa: E402
from fused_losses.train.frame.options import given_options  # noqa: E402
from fused_losses.train.glyphs import GlyphConfig, cli, compare, train  # noqa: E402
from fused_losses.train.glyphs import loop as loops  # noqa: E402
from fused_losses.train.glyphs.compare import HEADS, options  # noqa: E402
from fused_losses.train.glyphs.model import Changes, change, normalize  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("glyphs")]

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LATIN_GREEK_CYRILLIC = "21-17f,391-3c9,410-44f"


def characters(ranges: str) -> list[int]:
    found = GlyphConfig(characters=ranges).code_points()
    assert found
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for this file, in the child processes, too."""
    folder = tmp_path_factory.mktemp("cache")
    former = os.environ.get(glyph_sets.CACHE_VARIABLE)
    os.environ[glyph_sets.CACHE_VARIABLE] = str(folder)
    yield folder
    if former is None:
        del os.environ[glyph_sets.CACHE_VARIABLE]
    else:
        os.environ[glyph_sets.CACHE_VARIABLE] = former


def copied(folder: Path, *patterns: str) -> Path:
    """A folder of some fonts: reading all of matplotlib's takes most of a small set's time."""
    for pattern in patterns:
        for path in FONTS.glob(pattern):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def few_fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf")
    return copied(tmp_path_factory.mktemp("few"), *names)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("fonts"), "DejaVu*.ttf", "STIXGeneral*.ttf")


@pytest.fixture(scope="module")
def glyphs(cache: Path, fonts: Path) -> Glyphs:
    return load_glyphs([fonts], characters=characters(LATIN_GREEK_CYRILLIC), processes=1)


@pytest.fixture
def tiny(fonts: Path) -> GlyphConfig:
    return GlyphConfig(
        fonts=str(fonts),
        characters=LATIN_GREEK_CYRILLIC,
        held_out="STIX",
        embedding=32,
        batch_size=64,
        steps=6,
        subset=0,
        threads=1,
    )


# fonts


def test_fonts_are_found_once_and_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "Sans.ttf").write_bytes((FONTS / "DejaVuSans.ttf").read_bytes())
    (tmp_path / "a" / "notes.txt").write_text("no font")
    assert glyph_fonts.find_fonts([tmp_path]) == [tmp_path / "a" / "Sans.ttf"]
    monkeypatch.setenv(glyph_fonts.FOLDERS_VARIABLE, f"{tmp_path}{os.pathsep}{tmp_path}/absent")
    folders = glyph_fonts.font_folders()
    assert tmp_path in folders and FONTS in folders and tmp_path / "absent" not in folders
    with pytest.raises(ValueError, match="folders: expected folders of fonts"):
        glyph_fonts.find_fonts([tmp_path / "absent"])

    # one drawing for every block of Unicode; letters' codes for brackets; mostly private use
    for name in ("LastResortHE-Regular", "cmex10", "STIXNonUni"):
        faces, skipped = glyph_fonts.read_faces(FONTS / f"{name}.ttf")
        assert faces == [] and "fewer than 200" in skipped[0].reason
    cut = tmp_path / "cut.ttf"
    cut.write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:3000])
    faces, skipped = glyph_fonts.read_faces(cut)
    assert faces == [] and skipped[0].path == cut and "cannot be read" in skipped[0].reason


def test_only_characters_with_a_shape_are_drawn() -> None:
    ((face,), skipped) = glyph_fonts.read_faces(FONTS / "DejaVuSans.ttf")
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
    (face,), _ = glyph_fonts.read_faces(tmp_path / "two.ttc")
    assert face.shown[0x41] == (0, 1) and face.shown[0x43] == (0,)
    drawn = glyph_fonts.draw(face.path, [(0x41, 0), (0x41, 1), (0x42, 0)], 32)
    assert drawn.digests[1] == drawn.digests[2] != drawn.digests[0]


def test_drawings_are_whole_and_in_their_place() -> None:
    path = FONTS / "DejaVuSans.ttf"
    # an ideographic full width, a wide ligature, a full stop, a middle dot, a space, a tall bracket
    codes = [ord(c) for c in "HW.· Ǻ|"] + [0xFDFA]
    drawn = glyph_fonts.draw(path, [(code, 0) for code in codes], 32)
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
    large = glyph_fonts.draw(path, [(ord("H"), 0)], 64)
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
    drawn = glyph_fonts.draw(FONTS / font.file, [(ord("g"), 0)], 32)
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
        return load_glyphs([fonts], **options)  # type: ignore[arg-type]

    def refuse(*args: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(glyph_sets, "_make", refuse)
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


def test_processes_draw_the_same(few_fonts: Path, tmp_path: Path) -> None:
    some = {"characters": range(0x21, 0x100), "size": 16}
    one = load_glyphs([few_fonts], cache=tmp_path / "one", processes=1, **some)
    two = load_glyphs([few_fonts], cache=tmp_path / "two", processes=2, **some)
    assert one.file.path.read_bytes() == two.file.path.read_bytes()


def test_a_font_that_cannot_be_drawn_is_left_out(
    few_fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = glyph_fonts.draw

    def draw(path: Path, *rest: object) -> glyph_fonts.Drawings:
        if path.name == "STIXGeneral.ttf":
            raise OSError("invalid outline")
        return true(path, *rest)

    monkeypatch.setattr(glyph_sets, "draw", draw)
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


# the recipe


def test_pictures_change_as_fonts_do(glyphs: Glyphs) -> None:
    pictures = glyphs.read(range(40))
    one, two = (change(pictures, Changes(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == pictures.shape and one.isfinite().all()
    assert not torch.equal(one, change(pictures, Changes(), torch.Generator().manual_seed(4)))
    still = Changes(0, 0, 0, 0, 0)
    unchanged = change(pictures, still, torch.Generator())
    torch.testing.assert_close(unchanged, normalize(pictures), atol=1e-3, rtol=0)
    # ink to the power of less than one is bolder
    bold = change(pictures, Changes(0, 0, 0, 5.0, 0), torch.Generator().manual_seed(0))
    bolder, thinner = (
        (bold > unchanged + 0.1).any((1, 2, 3)),
        (bold < unchanged - 0.1).any((1, 2, 3)),
    )
    assert bolder.any() and thinner.any() and not (bolder & thinner).any()


def test_it_learns_and_writes_its_record(tiny: GlyphConfig, glyphs: Glyphs, tmp_path: Path) -> None:
    config = tiny.with_changes(steps=50, classes=100, queries=90, subset=60, subset_steps=8)
    result = train(config, tmp_path, quiet=True, glyphs=glyphs)
    assert result == json.loads((tmp_path / "result.json").read_text())
    curves = json.loads((tmp_path / "curves.json").read_text())["loss"]
    assert sum(curves["trained"][-5:]) < 0.8 * sum(curves["trained"][:5])
    assert result["recall_at_1"] > result["untrained"]["recall_at_1"] + 0.1
    assert result["recall_at_1_of_centres"] > result["untrained"]["recall_at_1_of_centres"] + 0.1
    assert result["gallery"] == result["classes"] == 100 and result["queries"] == 90
    assert result["step_ms"] > result["head_ms"] > 0 and result["peak_memory_mib"] > 0
    assert result["data"]["held_out"] == ["STIXGeneral"]
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert not (tmp_path / "checkpoint.pt").exists()
    # the same pictures, network and table: both heads differ by rounding, which steps amplify
    assert result["subset"]["classes"] == result["reference"]["classes"] == 60
    torch.testing.assert_close(
        torch.tensor(curves["subset"][:6]), torch.tensor(curves["reference"][:6]), rtol=1e-3, atol=0
    )
    with pytest.raises(ValueError, match="holds a run"):
        train(config, tmp_path, quiet=True, glyphs=glyphs)


@pytest.mark.parametrize(
    ("changes", "rounding"),
    # a checkpoint catches up the rows that a sampled head left behind, which rounds otherwise
    [({}, 0.0), ({"sample_rate": 0.3, "log_q": True}, 1e-5), ({"head": "reference"}, 0.0)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    changes: dict,
    rounding: float,
    tiny: GlyphConfig,
    glyphs: Glyphs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny.with_changes(classes=100, **changes)
    train(config, tmp_path / "whole", quiet=True, glyphs=glyphs)
    true = loops.GlyphTraining.step

    def step(self: loops.GlyphTraining) -> float:
        loss = true(self)
        if self.done == 3 and len(self.split.train.names) > loops.WARM_UP_CLASSES:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(loops.GlyphTraining, "step", step)
        train(config, tmp_path / "parts", quiet=True, glyphs=glyphs)
    with pytest.raises(ValueError, match="scale: the run has 32.0, asked for 5.0"):
        other = config.with_changes(scale=5.0)
        train(other, tmp_path / "parts", resume=True, quiet=True, glyphs=glyphs)
    train(config, tmp_path / "parts", resume=True, quiet=True, glyphs=glyphs)
    whole, parts = (
        json.loads((tmp_path / name / "curves.json").read_text())["loss"]["trained"]
        for name in ("whole", "parts")
    )
    assert len(parts) == config.steps and parts[:3] == whole[:3]
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=rounding, atol=0)


def test_heads_are_compared_in_their_own_processes(
    tiny: GlyphConfig, glyphs: Glyphs, tmp_path: Path
) -> None:
    config = tiny.with_changes(steps=3)
    found = compare(config, tmp_path, quiet=True, heads=("full",))
    assert list(found) == ["full"]
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    one = found["full"]
    assert one["classes"] == hold_out(glyphs, "STIX").train.classes
    assert one["subset"] is None and one["step_ms"] > 0 and one["peak_memory_mib"] > 0
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| full |")
    assert (tmp_path / "compare.png").stat().st_size > 0


def test_the_heads_compared_differ_in_what_they_say(tiny: GlyphConfig) -> None:
    made = {name: tiny.with_changes(**changes) for name, changes in HEADS.items()}
    assert len(set(made.values())) == len(made) == 6
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    for config in made.values():
        # what a head's process is told is what is compared
        args = parser.parse_args(options(config))
        assert GlyphConfig(**given_options(args, GlyphConfig)) == config


def test_the_command_line_says_what_is_wrong(
    fonts: Path, glyphs: Glyphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--runs", str(tmp_path), "--quiet"]
    assert cli.main([*run, "--characters", "zz"]) == 2
    assert "characters: expected ranges such as 21-17f, got 'zz'" in capsys.readouterr().err
    assert cli.main([*run, "--resume"]) == 2
    assert "name: expected the run to go on with" in capsys.readouterr().err
    assert cli.main([*run, "--head", "reference", "--sample-rate", "0.5"]) == 2
    assert "the reference takes every class" in capsys.readouterr().err
    words = ["--fonts", str(fonts), "--characters", LATIN_GREEK_CYRILLIC, "--steps", "2"]
    words += ["--subset", "0", "--threads", "1", "--batch-size", "8", "--embedding", "16"]
    words += ["--classes", "40"]
    assert cli.main([*run, *words]) == 0
    assert (tmp_path / "glyphs" / "result.json").exists()
    # what is not said again stays as it was
    assert cli.main([*run, "--name", "glyphs", "--resume"]) == 0
    assert cli.main([*run, *words]) == 0 and (tmp_path / "glyphs-2").is_dir()
