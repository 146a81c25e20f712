"""Encoded pictures: right values of every depth, upright, and bombs refused before they go off."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy
import pytest
import torch
from dataset_pictures import Image, encode, pixels, png
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.decoding import MAX_SCANS, MAX_SLOW_PIXELS, decode_picture

EVERY = numpy.arange(1 << 16, dtype=numpy.uint16).reshape(256, 256)


def decoded(data: bytes, size: tuple[int, int], channels: int = 3) -> Tensor:
    return decode_picture(data, size, channels, "x")


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def tiff(
    values: numpy.ndarray, kind: int = 1, bits: int = 16, white: int = 1, **more: int
) -> bytes:
    """An uncompressed grey TIFF in the machine's order of `values.dtype`; kind: SampleFormat."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape if bits != 12 else (values.shape[0], values.shape[1] * 2 // 3)
    data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: kind} | {int(tag): value for tag, value in more.items()}
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + directory + b"\0\0\0\0"


# ---- values -------------------------------------------------------------------------------------

SIXTEEN = {
    "PNG": saved(Image.fromarray(EVERY), "PNG"),
    "TIFF": tiff(EVERY.astype("<u2")),
    "TIFF, big-endian": tiff(EVERY.astype(">u2")),
    "TIFF, white is zero": tiff((65535 - EVERY).astype("<u2"), white=0),
    "TIFF, LZW": saved(Image.fromarray(EVERY), "TIFF", compression="tiff_lzw"),
    "TIFF, LZW, big-endian": saved(
        Image.fromarray(EVERY.astype(">u2")), "TIFF", compression="tiff_lzw"
    ),
    "PGM": b"P5 256 256 65535\n" + EVERY.astype(">u2").tobytes(),
    "PGM, text": b"P2 256 256 65535\n" + " ".join(map(str, EVERY.ravel())).encode(),
}


@pytest.mark.parametrize("data", SIXTEEN.values(), ids=SIXTEEN.keys())
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_their_high_byte(data: bytes, channels: int) -> None:
    found = decoded(data, (256, 256), channels)
    assert found.equal(torch.arange(256, dtype=torch.uint8)[:, None].expand(channels, 256, 256))


def test_depths_between_eight_and_sixteen() -> None:
    ten = (numpy.arange(1024, dtype=numpy.uint16).reshape(32, 32)).astype(">u2")
    found = decoded(b"P5 32 32 1023\n" + ten.tobytes(), (32, 32), 1)[0]
    exact = torch.from_numpy(ten.astype(numpy.float64)) / 1023 * 255
    assert (found.double() - exact).abs().max() < 1
    # twelve bits, packed: two values in three bytes
    twelve = numpy.arange(4096, dtype=numpy.uint32).reshape(64, 64)
    even, odd = twelve[:, 0::2], twelve[:, 1::2]
    packed = numpy.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2)
    data = tiff(packed.reshape(64, 96).astype(numpy.uint8), bits=12)
    assert decoded(data, (64, 64), 1)[0].equal(torch.from_numpy((twelve >> 4).astype(numpy.uint8)))


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (saved(Image.fromarray(numpy.eye(4, dtype=numpy.float32)), "TIFF"), "floats"),
        (saved(Image.fromarray(numpy.eye(4, dtype=numpy.int32)), "TIFF"), "signed or 32-bit"),
        (tiff(numpy.eye(4).astype("<i2"), kind=2), "signed or 32-bit"),
        (b"Pf 4 4 -1\n" + numpy.eye(4, dtype="<f4").tobytes(), "floats"),
    ],
    ids=["float TIFF", "32 bits", "signed", "PFM"],
)
def test_values_without_a_range_are_refused(data: bytes, got: str) -> None:
    with pytest.raises(DataError, match=f"x: expected unsigned values of 8 to 16 bits, got {got}"):
        decoded(data, (4, 4))


# ---- orientation --------------------------------------------------------------------------------

# what a viewer does to the stored rows and columns
UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.rot90(-1, (1, 2)),
    7: lambda x: x.flip(1, 2).transpose(1, 2),
    8: lambda x: x.rot90(1, (1, 2)),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_stand_upright(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # flat blocks, which a JPEG keeps
    stored = pixels(3, (2, 3)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0}
    image = Image.fromarray(stored.permute(1, 2, 0).numpy())
    data = saved(image, form, exif=exif, **(options if form in ("WEBP", "JPEG") else {}))
    wanted = UPRIGHT[orientation](stored)
    found = decoded(data, tuple(wanted.shape[1:]))
    assert (found.int() - wanted.int()).abs().max() <= (3 if form == "JPEG" else 0)
    # and when it is made smaller
    small = wanted[:, ::8, ::8]
    found = decoded(data, tuple(small.shape[1:]))
    assert (found.int() - small.int()).abs().max() <= (3 if form == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_orientation_that_cannot_be_read_is_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(pixels(0, (8, 8)), "JPEG")
    # 9 is none of the eight
    wrong = exif.tobytes()[6:].replace(b"\0\x06\0\0", b"\0\x09\0\0")
    for broken in (b"II*\0\xff\xff\xff\xff", b"??", exif.tobytes()[6:20], wrong):
        part = b"Exif\0\0" + broken
        data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part + whole[2:]
        assert decoded(data, (8, 8)).equal(decoded(whole, (8, 8)))


# ---- bounds -------------------------------------------------------------------------------------


def png_claim(width: int, height: int) -> bytes:
    """A PNG's header and no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + data + b"\0\0\0\0IDAT\0\0\0\0"


def webp_claim(width: int, height: int) -> bytes:
    """A lossless WebP of one colour: nothing of it depends on its size but the header."""
    small = saved(Image.new("RGB", (4, 4)), "WEBP", lossless=True)
    at = small.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", small, at)[0] & ~((1 << 28) - 1) | width - 1 | height - 1 << 14
    return small[:at] + struct.pack("<I", bits) + small[at + 4 :]


def bmp_claim(side: int) -> bytes:
    """Run-length encoded, which Pillow decodes in Python."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 100, 0, 0, 256, 0)
    offset = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", offset + 100, 0, 0, offset) + header + bytes(1124)


SLOW = int(MAX_SLOW_PIXELS**0.5) + 1
BOMBS = {
    "PNG 1 x 2^26": (png_claim(1, 1 << 26), "32768 pixels a side, got 1 x 67108864"),
    "PNG 2^26 x 1": (png_claim(1 << 26, 1), "32768 pixels a side"),
    "PNG 8191": (png_claim(8191, 8191), "16777216 pixels for 112 x 112, got 8191 x 8191"),
    "PNG 9000": (png_claim(9000, 9000), "67108864 pixels, got 9000 x 9000"),
    "WebP 8191": (webp_claim(8191, 8191), "16777216 pixels for 112 x 112"),
    "PPM of 254": (b"P6 %d %d 254\n" % (SLOW, SLOW), "2097152 pixels in this form .ppm."),
    "PPM of text": (b"P3 %d %d 255\n" % (SLOW, SLOW), "2097152 pixels in this form .ppm_plain."),
    "BMP of runs": (bmp_claim(SLOW), "2097152 pixels in this form .bmp_rle."),
    "TIFF of tiles": (
        tiff(EVERY, **{"322": 1 << 16, "323": 1 << 16}),
        r"32768 pixels a side of its tiles, which are \[65536, 65536\]",
    ),
    "TIFF of large tiles": (
        tiff(EVERY, **{"322": 1 << 15, "323": 1 << 15}),
        r"\d+ pixels in its tiles",
    ),
    "TIFF of odd tiles": (
        tiff(EVERY, **{"322": 1 << 31, "323": 1}),
        r"\d+ pixels a side of its tiles",
    ),
}


@pytest.mark.parametrize(("data", "told"), BOMBS.values(), ids=BOMBS.keys())
def test_a_claim_is_refused_before_it_is_decoded(data: bytes, told: str) -> None:
    with pytest.raises(DataError, match=f"x: expected a picture of at most {told}"):
        decoded(data, (112, 112))


def test_the_bound_grows_with_the_size_asked_for() -> None:
    grey = saved(Image.new("L", (5000, 4000), 7), "PNG")
    with pytest.raises(DataError, match="at most 16777216 pixels for 224 x 224"):
        decoded(grey, (224, 224))
    assert int(decoded(grey, (300, 300), 1).max()) == 7


def test_a_large_jpeg_is_decoded_at_an_eighth() -> None:
    values = numpy.add.outer(numpy.arange(4104), numpy.arange(4200)) % 256
    large = numpy.repeat(numpy.repeat(values[::513, ::525], 513, 0), 525, 1).astype(numpy.uint8)
    found = decoded(saved(Image.fromarray(large), "JPEG", quality=95), (8, 8), 1)
    assert (found[0].int() - torch.from_numpy(values[::513, ::525])).abs().max() <= 4


def test_a_jpeg_of_many_scans_is_refused() -> None:
    image = Image.new("L", (2048, 2048))
    whole = saved(image, "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert decoded(whole[:-2] + 8 * last + whole[-2:], (4, 4)).sum() == 0
    scans = whole.count(b"\xff\xda") + 300
    assert scans * 2048 * 2048 > MAX_SCANS
    with pytest.raises(DataError, match=rf"at most {MAX_SCANS} pixels in all its {scans} scans"):
        decoded(whole[:-2] + 300 * last + whole[-2:], (4, 4))


def test_an_encoded_picture_is_bounded() -> None:
    with pytest.raises(DataError, match="x: expected at most 268435456 bytes, got 268435457"):
        decoded(png(0) + bytes((1 << 28) + 1 - len(png(0))), (4, 4))
