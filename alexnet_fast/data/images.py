"""Image files from strangers: few formats, dimensions checked before decoding, and no half-decoded picture passes."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 1 << 26  # 8192 x 8192: 192 MiB once decoded to RGB


class BadImage(Exception):
    """``path`` holds no usable picture; ``reason`` says why, on one line."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


DEPTHS = (8, 10, 12, 14, 16)  # bits of a value that cameras and scanners use, of the 16 or 32 that a file has


def read_image(path: str | Path, exif: bool = True) -> Image.Image:
    """The picture in a file as 8-bit RGB, upright as its EXIF orientation says if ``exif``; the first frame of an
    animation, grey repeated in the three channels, what is transparent on white.

    Deep grey is scaled from the smallest of ``DEPTHS`` that holds its values, floats from 0..1 or 0..255.

    Raises :class:`BadImage` for a file that is missing, unreadable, empty, truncated, in another format than
    ``FORMATS``, or larger than ``MAX_PIXELS`` (found in the header, before anything is decoded).
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            raise BadImage(path, "not a regular file")
        if status.st_size == 0:
            raise BadImage(path, "empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadImage(path, f"{width}x{height} is larger than {MAX_PIXELS} pixels")
                return _rgb(_upright(image) if exif else image, path)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(path, f"larger than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage(path, f"not an image in a known format ({', '.join(FORMATS)})") from None
    except OSError as error:
        raise BadImage(path, _one_line(error.strerror or error)) from None
    except Exception as error:  # Pillow's decoders meet damage with SyntaxError, struct.error, IndexError and others
        raise BadImage(path, f"damaged ({type(error).__name__}: {_one_line(error)})") from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the picture
        return image


def _rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip at 255
        return Image.fromarray(_eight_bits(np.asarray(image), path)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray, path: str | Path) -> np.ndarray:
    """Grey of whole numbers or floats as uint8; raises :class:`BadImage` where its range is none that is known."""
    least, most = float(grey.min()), float(grey.max())
    if grey.dtype.kind == "f":
        if not (least >= 0 and most <= 255):  # NaN too
            raise BadImage(path, f"floats from {least:g} to {most:g}, expected 0..1 or 0..255")
        return (grey * (255 if most <= 1 else 1)).round().astype(np.uint8)
    bits = next((bits for bits in DEPTHS if most < 1 << bits), None)
    if least < 0 or bits is None:
        raise BadImage(path, f"values from {least:.0f} to {most:.0f}, expected 0 to 65535")
    return (grey.astype(np.int64) >> (bits - 8)).astype(np.uint8)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or "no reason given"
