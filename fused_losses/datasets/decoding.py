"""How encoded pictures become tensors: by Pillow, within bounds that are checked before it decodes.

A few bytes may claim a picture that takes gigabytes or minutes. What is bounded: each side, the
pixels by the size asked for, and by less where decoding a pixel costs more.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.files import MAX_ENCODED

if TYPE_CHECKING:
    from PIL.Image import Image

# no format that starts another program (EPS) or is a list of drawing commands (WMF)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
MAX_PIXELS = 1 << 26  # of any picture
MAX_SIDE = 1 << 15
LEAST_PIXELS = 1 << 24  # allowed whatever the size asked for,
PIXELS_A_PIXEL = 1 << 8  # and so many for each pixel asked for
MAX_SLOW_PIXELS = 1 << 21  # where Pillow decodes in Python: some microseconds a pixel
MAX_SCANS = 1 << 30  # pixels times scans of a JPEG: each scan may pass over all pixels
SCAN = b"\xff\xda"  # before each scan; inside of one 0xff stands before 0 or a restart's mark alone
DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's names of unsigned 16-bit grey
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of TIFF, the first one of EXIF, too
TILE_WIDTH, TILE_LENGTH = 322, 323
ON_ITS_SIDE = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
UPRIGHT = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM")
TURNS = dict(enumerate(UPRIGHT + ON_ITS_SIDE, start=2))  # EXIF's orientation -> what undoes it


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of pictures; one integer means a square."""
    pair = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    ):
        raise TypeError(f"size: expected an integer or (height, width), got {size!r}")
    if min(pair) < 1 or max(pair) > MAX_SIDE or pair[0] * pair[1] > MAX_PIXELS:
        raise ValueError(
            f"size: expected sides of 1 to {MAX_SIDE} and at most {MAX_PIXELS} pixels, got {size!r}"
        )
    return int(pair[0]), int(pair[1])


def check_channels(channels: int) -> int:
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {channels!r}")
    return channels


def decode_picture(
    encoded: bytes,
    size: tuple[int, int],
    channels: int,
    where: str,  # what an error names
) -> Tensor:
    """An encoded picture at a size. [channels, height, width] uint8

    Turned as its EXIF orientation says. Shrinks and grows by averaging over the covered pixels
    (Pillow's BOX). Of 16-bit values the high bytes count. Raises DataError for bytes that are no
    picture of FORMATS, beyond the bounds above, or of floats or signed values, whose range no
    format tells.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError(
            "reading pictures needs Pillow: pip install 'fused-losses[train]'"
        ) from None
    if len(encoded) > MAX_ENCODED:
        raise DataError(f"{where}: expected at most {MAX_ENCODED} bytes, got {len(encoded)}")
    height, width = size
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _check_bounds(image, encoded, size, where)
            image.load()
            turn = _turn(image)
            flat = _eight_bits(image, where).convert("L" if channels == 1 else "RGB")
            # turned when it is small
            stored = (height, width) if turn in ON_ITS_SIDE else (width, height)
            flat = flat.resize(stored, Image.Resampling.BOX)
            if turn:
                flat = flat.transpose(Image.Transpose[turn])
            pixels = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
    except DataError:
        raise
    # Pillow's decoders raise whatever their parsing trips over
    except Exception as error:
        raise DataError(
            f"{where}: not a picture that can be read ({type(error).__name__}: {error})"
        ) from None
    return pixels.view(height, width, channels).permute(2, 0, 1).contiguous()


def _check_bounds(image: Image, encoded: bytes, size: tuple[int, int], where: str) -> None:
    """DataError for a picture that costs more than it can be worth; a large JPEG is made smaller.

    That JPEG is decoded at a half, a quarter or an eighth of its size, still at least the size
    asked for: its decoder's own averages.
    """
    from PIL.Image import DECODERS

    def refuse(most: int, what: str) -> DataError:
        return DataError(
            f"{where}: expected a picture of at most {most} {what}, got {image.width} x "
            f"{image.height} ({image.format})"
        )

    if max(image.size) > MAX_SIDE:
        raise refuse(MAX_SIDE, "pixels a side")
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise refuse(MAX_PIXELS, "pixels")
    if image.format in ("JPEG", "MPO"):
        scans = encoded.count(SCAN)
        if pixels * scans > MAX_SCANS:
            raise refuse(MAX_SCANS, f"pixels in all its {scans} scans")
    most = min(MAX_PIXELS, max(LEAST_PIXELS, PIXELS_A_PIXEL * size[0] * size[1]))
    if pixels > most and image.format in ("JPEG", "MPO"):
        image.draft(None, (max(size), max(size)))
        pixels = image.width * image.height
    if pixels > most:
        raise refuse(most, f"pixels for {size[1]} x {size[0]}")
    codecs = {part[0] for part in getattr(image, "tile", [])}
    if pixels > MAX_SLOW_PIXELS and codecs & DECODERS.keys():
        raise refuse(MAX_SLOW_PIXELS, f"pixels in this form ({', '.join(codecs)})")
    tile = [_tag(image, tag, 0) for tag in (TILE_WIDTH, TILE_LENGTH)]
    if not all(isinstance(side, int) and side <= MAX_SIDE for side in tile):
        raise refuse(MAX_SIDE, f"pixels a side of its tiles, which are {tile}")
    if tile[0] * tile[1] > most:
        raise refuse(most, f"pixels in its tiles, which are {tile}")


def _tag(image: Image, tag: int, otherwise: Any) -> Any:
    """Of a TIFF; other formats have none."""
    return getattr(image, "tag_v2", {}).get(tag, otherwise)


def _turn(image: Image) -> str:
    """What brings the stored picture upright: a name of Pillow's Transpose, or none.

    EXIF that can't be read is none: the pixels are right without it.
    """
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return ""
    return TURNS.get(orientation, "") if isinstance(orientation, int) else ""


def _eight_bits(image: Image, where: str) -> Image:
    """The picture with values of eight bits: of more the high ones."""
    if image.mode in DEEP:
        bits = _tag(image, BITS, (16,))[0]
        flat = image.convert("I").point(lambda value: value * 2.0 ** (8 - bits)).convert("L")
        # Pillow turns white-is-zero around for at most eight bits
        inverted = image.format == "TIFF" and _tag(image, PHOTOMETRIC, 0) == 0
        return flat.point(lambda value: 255 - value) if inverted else flat
    # Pillow brings what PGM says is white to 65,535
    if image.mode == "I" and image.format == "PPM":
        return image.point(lambda value: value * 2.0**-8).convert("L")
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "signed or 32-bit values"
        raise DataError(
            f"{where}: expected unsigned values of 8 to 16 bits, got {kind} ({image.format}), of "
            "which the file does not say what is black and white: store it as PNG or 16-bit TIFF"
        )
    return image
