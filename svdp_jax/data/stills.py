"""Images, by Pillow: a still one as RGB, and the frames of an animated one (GIF, WebP, PNG, AVIF).

In: the path of a file. Out: how many frames it has, 0 where it is no image; and their pixels, uint8 [H, W, 3]. An image
that cannot be read is a MediaError; but an animated one ends before the first frame that cannot.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from svdp_jax.files import MediaError, one_line

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # images whose further ones are frames; those of other formats are pages or previews


def frame_count(path: pathlib.Path) -> int:
    """How many frames an image has, 1 if it is still; 0 where the file is no image."""
    try:
        with _image(path) as image:
            if image.format == "MPEG":  # of which Pillow knows the name alone
                return 0
            return image.n_frames - _not_shown(image) if image.format in _ANIMATED else 1
    except MediaError as error:
        if isinstance(error.__cause__, Image.UnidentifiedImageError):
            return 0
        raise


def lacks_end(path: pathlib.Path) -> bool:
    """Whether a GIF stops before its end mark; how many frames it has lost, it does not say."""
    data = path.read_bytes()
    return data.startswith(b"GIF") and not data.rstrip(b"\0").endswith(b";")


def read(path: pathlib.Path) -> UInt8[np.ndarray, "H W 3"]:
    """A still image, upright; of an animated one, the first image in the file."""
    with _image(path) as opened:
        opened.verify()  # PNG's checksums, which reading passes over
    with _image(path) as opened:
        return _as_rgb(ImageOps.exif_transpose(opened))


def animation(path: pathlib.Path) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """When each frame of an animated image is shown, in seconds, and its pixels; up to the first that cannot be read."""
    with _image(path) as image:
        milliseconds = 0
        for number in range(_not_shown(image), image.n_frames):
            try:
                image.seek(number)
                picture = _as_rgb(image)
            except Exception:  # of a damaged file Pillow raises nearly anything
                return
            yield milliseconds / 1000, picture
            duration = image.info.get("duration") or 0
            milliseconds += duration if duration > 10 else 100  # as browsers have it


@contextlib.contextmanager
def _image(path: pathlib.Path) -> Iterator[Image.Image]:
    """An image, opened. Whatever goes wrong with it is a MediaError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise MediaError(f"{path}: not an image that can be read ({one_line(error)}); use a complete .jpg or .png") from error


def _not_shown(image: Image.Image) -> int:
    """1 where a PNG's first image is only for those who cannot show it moving."""
    return int(getattr(image, "default_image", False))


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # grey of 16 bits
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return on_white(image.convert("RGBA")) if image.has_transparency_data else np.array(image.convert("RGB"))


def on_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """An RGBA image, laid on white where it is transparent."""
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
