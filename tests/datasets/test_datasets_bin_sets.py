"""Verification sets: pickles of every protocol and of Python 2, read without running them."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from dataset_pictures import damaged, encode, outcome, png, write
from torch import Tensor

from fused_losses import metrics
from fused_losses.datasets import DataError, evaluate_bin, read_bin
from fused_losses.datasets.pickles.values import read_pickled

PICTURES = [png(i) for i in range(6)]
SAME = [True, False, True]


def python2(pictures: list[bytes], same: list[bool], protocol: int) -> bytes:
    """What Python 2's pickle writes for (list of str, list of bool)."""
    if protocol == 0:
        quoted = [repr(picture).encode()[1:] for picture in pictures]
        strings = [b"S%b\np%d\na" % (text, i + 2) for i, text in enumerate(quoted)]
        flags = [b"I01\na" if flag else b"I00\na" for flag in same]
        return b"(" + b"(lp1\n" + b"".join(strings) + b"(lp99\n" + b"".join(flags) + b"tp0\n."
    strings, put = [], 2
    for picture in pictures:
        short = len(picture) < 256
        head = b"U%c" % len(picture) if short else b"T" + struct.pack("<i", len(picture))
        strings.append(head + picture + b"q%c" % put)
        put += 1
    if protocol == 1:
        flags = [b"I01\n" if flag else b"I00\n" for flag in same]
        return b"(" + lists(strings, flags) + b"tq\0."
    flags = [b"\x88" if flag else b"\x89" for flag in same]
    return b"\x80\x02" + lists(strings, flags) + b"\x86q\0."


def lists(strings: list[bytes], flags: list[bytes]) -> bytes:
    return b"]q\1(" + b"".join(strings) + b"e]r\xff\0\0\0(" + b"".join(flags) + b"e"


def python2_array(data: bytes) -> bytes:
    """A uint8 array as Python 2's numpy pickles it (protocol 2)."""
    kind = b"cnumpy\ndtype\nU\x02u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
    shape = b"M" + struct.pack("<H", len(data)) + b"\x85"
    text = b"T" + struct.pack("<i", len(data)) + data
    return made + b"(K\1" + shape + kind + b"\x89" + text + b"tb"


def python3(protocol: int, pictures: object = PICTURES, same: object = SAME) -> bytes:
    return pickle.dumps((pictures, same), protocol)


def arrays(pictures: list[bytes]) -> list[numpy.ndarray]:
    return [numpy.frombuffer(picture, dtype=numpy.uint8) for picture in pictures]


VARIANTS = {
    **{f"python2-{p}": python2(PICTURES, SAME, p) for p in (0, 1, 2)},
    "python2-arrays": b"\x80\x02](%be](\x88\x89\x88e\x86." % b"".join(map(python2_array, PICTURES)),
    **{f"python3-{p}": python3(p) for p in range(6)},
    **{f"arrays-{p}": python3(p, arrays(PICTURES)) for p in range(6)},
    # numpy 2 renamed the module
    "arrays-numpy1": python3(0, arrays(PICTURES)).replace(b"numpy._core", b"numpy.core"),
    "writable": python3(5, [a.copy() for a in arrays(PICTURES)]),
    "numpy-bools": python3(4, PICTURES, list(numpy.array(SAME))),
    "bool-array": python3(4, PICTURES, numpy.array(SAME)),
    **{
        f"columns-{p}": python3(
            p, [a[:, None] for a in arrays(PICTURES)], numpy.array(SAME)[:, None]
        )
        for p in (2, 5)
    },
    "rows": python3(4, [a[None] for a in arrays(PICTURES)]),
    **{
        f"flags-{kind}-{p}": python3(p, PICTURES, numpy.array(SAME).astype(kind))
        for kind in ("<i8", ">i8", "<u2", ">i4", "u1", "i1", ">u8")
        for p in (0, 2, 5)
    },
    "numpy-integers": python3(4, PICTURES, list(numpy.array(SAME).astype("i8"))),
    "big-endian-integers": python3(2, PICTURES, list(numpy.array(SAME).astype(">i4"))),
    "integers": python3(2, PICTURES, [1, 0, 1]),
    "tuples": python3(3, tuple(PICTURES), tuple(SAME)),
    "list": pickle.dumps([PICTURES, SAME]),
    "long": python3(2, PICTURES, [1, 0, 1]).replace(b"K\1", b"\x8a\1\1"),
}


@pytest.mark.parametrize("data", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_way_such_a_set_is_pickled(tmp_path: Path, data: bytes) -> None:
    found = read_bin(write(tmp_path / "x.bin", data))
    assert found.images == PICTURES and all(type(image) is bytes for image in found.images)
    assert found.same.tolist() == SAME and found.same.dtype == torch.bool and len(found) == 3


def test_pictures_with_every_byte(tmp_path: Path) -> None:
    every = [bytes(range(256)), b"'\"\\n\n" * 90, b"\0" * 255, b"x" * 70000]
    for protocol in (0, 1, 2):
        data = python2(every, [True, False], protocol)
        assert read_bin(write(tmp_path / "a", data)).images == every
    for protocol in range(6):
        data = python3(protocol, every, [True, False])
        assert read_bin(write(tmp_path / "a", data)).images == every


class Runs:
    """Runs a command when its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_commands_runs_none(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    message = r"x\.bin: pickle instruction at offset \d+: expected .*system"
    for value in (Runs(trace), ([Runs(trace)], [True]), (PICTURES, Runs(trace))):
        with pytest.raises(DataError, match=message):
            read_bin(write(tmp_path / "x.bin", pickle.dumps(value, protocol)))
    assert not trace.exists()


HOSTILE = [
    (b"", "expected 1 bytes, got 0"),
    (b"\x80\x09.", "expected protocol 0 to 5, got 9"),
    (b"(i__main__\nx\n.", r"expected an instruction of plain values, got b'i'"),
    (b"c__builtin__\neval\n(Vprint(1)\ntR.", "got the name __builtin__.eval"),
    (b"\x8c\x08builtins\x8c\x04exec\x93.", "got the name builtins.exec"),
    (b"cnumpy\nload\n(Vx\ntR.", "got the name numpy.load"),
    (b"cnumpy.testing\nrunstring\n.", "got the name numpy.testing.runstring"),
    (b"cnumpy\nndarray\n(K\xfft\x52.", "expected a function, got numpy.ndarray"),
    (b"\x8e" + b"\xff" * 8 + b".", "expected 18446744073709551615 bytes, got 1"),
    (b"T\xff\xff\xff\xff.", "expected -1 bytes"),
    (b"T\xff\xff\xff\x7f.", "expected 2147483647 bytes, got 1"),
    (b"X\xff\xff\xff\xff.", "expected 4294967295 bytes"),
    (b"\x95" + b"\xff" * 8 + b".", "expected a frame of 18446744073709551615"),
    (b"I" + b"9" * 100000 + b"\n.", "expected an integer of at most 20 digits"),
    (b"Ix\n.", "damaged"),
    (b"S'abc\n.", "expected a quoted string"),
    (b"S'a\\qc'\n.", "expected an escape of a byte string"),
    (b"S'a\\x4'\n.", "expected an escape of a byte string"),
    (b"S'a\\'\n.", "expected an escape of a byte string"),
    (b"V\xff", "expected a line, the file ends"),
    (b"t.", "expected a mark"),
    (b"(.", "expected a value on the stack"),
    (b"\x86.", "expected a value on the stack"),
    (b"Na.", "expected a value on the stack|expected a list"),
    (b"NNa.", "expected a list"),
    (b"h\7.", "expected a remembered value, got number 7"),
    (b"NN.", "expected one value at the end, got 2"),
    (b"NNb.", "expected an array's state"),
    (b"cnumpy\ndtype\n(Vf8\ntR.", "expected an array of b1, u1, .*, got str 'f8'"),
    (b"cnumpy\ndtype\n)R.", "expected the arguments of numpy.dtype, got 0"),
    (b"cnumpy\ndtype\n(Vi4\ntR(K\3V=\ntb.", "expected an order of bytes <, > or |, got str '='"),
    (b"cnumpy\ndtype\n(Vi4\ntR(K\3tb.", "expected an order of bytes <, > or |, got NoneType"),
    (b"c_codecs\nencode\n(V\\u1234\nVlatin1\ntR.", "damaged"),
    (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "expected text in latin1"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=[m for _, m in HOSTILE])
def test_hostile_instructions_name_their_offset(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"f: pickle instruction at offset \d+: .*(?:{message})"):
        read_pickled(data, "f")


def test_copies_cannot_be_multiplied() -> None:
    text = b"X" + struct.pack("<I", 1 << 16) + b"x" * (1 << 16)
    again = b"c_codecs\nencode\nq\1" + text + b"q\2Vlatin1\nq\3(" + b"h\1h\2h\3\x86R" * 1000 + b"l."
    with pytest.raises(DataError, match="expected at most the file's .* bytes, made"):
        read_pickled(again, "f")


def test_instructions_are_bounded_by_what_pictures_need() -> None:
    """Three megabytes of them take seconds, and hold nothing."""
    most = (1 << 17) + 3 * (1 << 20) // 32
    with pytest.raises(DataError, match=f"at offset {most}: expected at most {most} instructions"):
        read_pickled(b"]" + b"N" * (3 * (1 << 20) - 2) + b".", "f")
    # small pictures as numpy's arrays, thousands of them
    read_pickled(python3(2, arrays(PICTURES) * 500, SAME * 500), "f")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", python3(4))
    os.truncate(path, 1 << 40)
    with pytest.raises(DataError, match=r"x\.bin: the pickle: expected 1 to 536870912 bytes"):
        read_bin(path)


def test_nested_and_shared_values_cost_no_more_than_their_size(tmp_path: Path) -> None:
    for data in (
        b"N" + b"\x85" * 20000 + b".",
        b"(" * 20000 + b"l" * 20000 + b".",
        b"]q\0h\0a.",
    ):
        read_pickled(data, "f")
        with pytest.raises(DataError, match=r"x: expected \(pictures, same\), got"):
            read_bin(write(tmp_path / "x", data))
    # doubled sixty times: 2^60 leaves for who walks it
    doubled = b"Nq\0" + b"h\0\x86q\0" * 60
    with pytest.raises(DataError, match="x: expected a list of same or not, got NoneType"):
        read_bin(write(tmp_path / "x", doubled + b"N\x86."))
    with pytest.raises(DataError, match="expected an array of b1, .*, got tuple of 2"):
        read_pickled(b"cnumpy\ndtype\n(" + doubled + b"tR.", "f")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (PICTURES, r"expected \(pictures, same\), got list of 6"),
        ((PICTURES, [True]), "expected a list of 2 pictures, .* of 1 pairs, got list of 6"),
        ((PICTURES, None), "expected a list of same or not, got NoneType"),
        ((PICTURES, [True, 2, False]), "pair 1: expected True or False, got int 2"),
        ((PICTURES, [True, "x", False]), "pair 1: expected True or False, got str 'x'"),
        (([b"a", b""], [True]), "picture 1: expected 1 to .* bytes .*, got bytes b''"),
        (([b"a", "a"], [True]), "picture 1: expected .*, got str 'a'"),
        (([b"a", numpy.zeros((2, 2), numpy.uint8)], [True]), "picture 1: expected .*, got Array"),
        ((b"ab", [True]), "expected a list of 2 pictures"),
        (([b"a", b"b"], numpy.array([[2]])), "pair 0: expected True or False, got int 2"),
        (([b"a", b"b"], numpy.array([-1], ">i2")), "pair 0: expected True or False, got int -1"),
        (([b"a", b"b"], numpy.eye(2, dtype=bool)), "expected a list of same or not, got Array"),
        (([b"a", numpy.zeros(1, "i2")], [True]), "picture 1: expected .*, got Array"),
    ],
)
def test_values_that_are_no_set(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"x\.bin: {message}"):
        read_bin(write(tmp_path / "x.bin", pickle.dumps(value)))


@pytest.mark.parametrize("name", ["python2-0", "python2-2", "arrays-2", "arrays-5", "python3-4"])
def test_damage_gives_data_or_an_error(tmp_path: Path, name: str) -> None:
    refused = 0
    for seed in range(120):
        path = write(tmp_path / "x", damaged(VARIANTS[name], seed))
        found = outcome(lambda path=path: read_bin(path))
        if isinstance(found, str):
            refused += 1
        else:
            assert len(found.images) == 2 * len(found.same)
    assert refused >= 40


def test_truncated_sets_are_refused(tmp_path: Path) -> None:
    for data in VARIANTS.values():
        for length in range(0, len(data), 41):
            assert outcome(lambda d=data[:length]: read_pickled(d, "f")) == "refused"
    with pytest.raises(DataError, match="gone: cannot be opened"):
        read_bin(tmp_path / "gone")


# ---- evaluation ---------------------------------------------------------------------------------


def faces(tmp_path: Path, pairs: int) -> tuple[Path, list[bool]]:
    """Pairs of flat pictures: of one colour, or of two."""
    colours = torch.randint(0, 256, (pairs, 3), generator=torch.Generator().manual_seed(0))
    same = [p % 2 == 0 for p in range(pairs)]
    pictures = []
    for p in range(pairs):
        for q in (p, p if same[p] else (p + 1) % pairs):
            flat = colours[q].to(torch.uint8)[:, None, None].expand(3, 8, 8).contiguous()
            pictures.append(encode(flat))
    return write(tmp_path / "x.bin", pickle.dumps((pictures, same))), same


def by_means(pictures: Tensor) -> Tensor:
    return pictures.float().mean(dim=(2, 3)) - 128


def test_evaluation_is_the_metrics_of_the_cosines(tmp_path: Path) -> None:
    path, same = faces(tmp_path, 40)
    sizes = []

    def embed(pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, 4, 6)
        sizes.append(len(pictures))
        return by_means(pictures)

    found = evaluate_bin(embed, path, size=(4, 6), batch=33, mirror=False, far=(0.1, 0.01))
    assert sizes == [33, 33, 14]
    x = by_means(read_bin(path).read(range(80), 4)).double()
    cosines = torch.nn.functional.cosine_similarity(x[0::2], x[1::2])
    assert torch.allclose(found.scores, cosines)
    wanted = metrics.verification_accuracy(cosines, torch.tensor(same), 10)
    assert found.accuracy.mean == pytest.approx(wanted.mean) and wanted.mean > 0.9
    assert len(found.accuracy.accuracy) == 10
    assert found.tar == metrics.tar_at_far(cosines, torch.tensor(same), [0.1, 0.01])


def test_mirror_images_are_added(tmp_path: Path) -> None:
    left = torch.zeros(3, 4, 4, dtype=torch.uint8)
    left[:, :, :2] = 200
    data = pickle.dumps(([encode(left), encode(left.flip(2))] * 2, [True, True]))
    columns: Callable[[Tensor], Tensor] = lambda pictures: pictures.float().mean(dim=(1, 2))
    path = write(tmp_path / "x", data)
    plain, both = (
        evaluate_bin(columns, path, size=4, mirror=mirror, folds=2) for mirror in (False, True)
    )
    assert plain.scores.tolist() == pytest.approx([0, 0])
    assert both.scores.tolist() == pytest.approx([1, 1])


def test_evaluation_checks_what_it_gets(tmp_path: Path) -> None:
    path, _ = faces(tmp_path, 10)
    with pytest.raises(ValueError, match=r"embed: expected \[20, D\] for 20 pictures, got shape"):
        evaluate_bin(lambda pictures: torch.zeros(3, 4), path, size=4)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        evaluate_bin(by_means, path, size=4, batch=0)
    broken = write(tmp_path / "y.bin", pickle.dumps(([png(0), b"x"], [True])))
    with pytest.raises(DataError, match=r"y\.bin: picture 1: not a picture"):
        evaluate_bin(by_means, broken, size=4)
    with pytest.raises(DataError, match="expected pairs, got none"):
        evaluate_bin(by_means, write(tmp_path / "z", pickle.dumps(([], []))), size=4)
