"""Image files from strangers: few formats, dimensions checked before decoding, and no half-decoded picture passes."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 1 << 26  # 8192 x 8192: 192 MiB once decoded to RGB


class BadImage(Exception):
    """``path`` holds no usable picture; ``reason`` says why, on one line."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file as 8-bit RGB; the first frame of an animation, grey repeated in the three channels.

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
                return _rgb(image)
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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or "no reason given"
