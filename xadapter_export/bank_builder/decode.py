"""From the bytes of a picture of any kind to an upright RGB picture, as CLIP's preprocessing wants it."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class UndecodableError(Exception):
    """A picture that is skipped; the text says why, and nothing of the machine."""


def decode_picture(data: bytes, side: int) -> Image.Image:
    """Return the first frame, turned upright, as RGB; what is transparent becomes white.

    Args:
        data: The file.
        side: Pixels to which its shorter side will be brought.

    Raises:
        UndecodableError: If it is no picture, is damaged, or is far too large.
    """
    if not data:
        raise UndecodableError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in files: what matters is whether they decode
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            _check_size(image, side)
            image.seek(0)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UndecodableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableError(f"too large: {error}") from error
    except UnidentifiedImageError as error:  # its text names an object in memory
        raise UndecodableError("not an image that Pillow can read") from error
    except MemoryError as error:
        raise UndecodableError("too large for memory") from error
    except Exception as error:  # decoders raise many kinds for damaged files
        raise UndecodableError(f"damaged: {str(error) or type(error).__name__}") from error


def make_thumbnail(image: Image.Image, size: int) -> bytes:
    """Return an RGB picture, at most ``size`` pixels wide and high, as WebP."""
    small = image.copy()
    small.thumbnail((size, size))
    stream = io.BytesIO()
    small.save(stream, "webp", quality=80)
    return stream.getvalue()


def _check_size(image: Image.Image, side: int) -> None:
    """Refuse a strip whose shorter side, brought to CLIP's size, makes the longer one a bomb."""
    short, long = sorted(image.size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and long / max(short, 1) * side**2 > limit:
        raise UndecodableError(f"too long for its width: {image.width} x {image.height} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale gray of 16 bits, or a float image, to 8; Pillow would cut it off at 255."""
    values: Any = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values) * (255 if np.nanmax(values) <= 1 else 1)
    elif image.mode != "I" or values.max() > 255:
        values = values / 257
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
