"""Image files as arrays: every file that a person may hand over becomes uint8 RGB or one clear sentence."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from msvmamba_jax.errors import InputError

# Formats that Pillow decodes in its own process from the file alone (EPS, for one, would start Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# What `find_images` takes for an image inside a folder; compared in lower case.
EXTENSIONS = (
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

# A larger image is taken for a decompression bomb. The limit is that of Pillow's own error, kept here so that it holds
# even where an application has switched Pillow's check off.
MAX_PIXELS = 178_956_970

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns


class DamagedImageError(InputError):
    """An image file can be opened, but its content cannot be decoded."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file of any colour mode.

    The content decides the format, not the extension. EXIF rotation is applied, transparency is composited over white,
    16-bit grey is scaled to 8 bits, CMYK is converted to RGB; of an animation the first frame is taken, and colour
    profiles are ignored.

    Args:
        path: the file.

    Returns:
        uint8 array of shape (height, width, 3), RGB, of its own memory.

    Raises:
        InputError: the file is missing, unreadable, damaged, no image, or too large.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return decode_image(file, name=path)
    except OSError as error:  # `decode_image` raises none: this is about opening the file.
        raise InputError(f"Cannot open the image {path}: {error.strerror or error}.") from error


def decode_image(data: bytes | IO[bytes], *, name: str) -> np.ndarray:
    """Decodes an encoded image; see `read_image`.

    Args:
        data: the encoded bytes, or a binary file open at its start.
        name: how messages call this image, such as its path.

    Returns:
        uint8 array of shape (height, width, 3), RGB.

    Raises:
        DamagedImageError: the content is damaged, no image, or too large.
    """
    return np.array(decode_picture(data, name=name))


def decode_picture(data: bytes | IO[bytes], *, name: str) -> Image.Image:
    """As `decode_image`, but an RGB image of Pillow's with all of its pixels in memory.

    For what Pillow works on next: an array of a photograph, and an image of that again, are two more copies of it.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with Image.open(file, formats=_known_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            image.load()
            return _to_rgb(_upright(image), image.format)
    except Image.UnidentifiedImageError as error:
        raise DamagedImageError(f"{name} is not an image that can be read; JPEG and PNG files are.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DamagedImageError(
            f"The image {name} is too large to be read safely (more than {MAX_PIXELS} pixels): make it smaller."
        ) from error
    # Pillow's decoders meet damaged files with OSError, SyntaxError, ValueError, struct.error, EOFError and more.
    except Exception as error:
        raise DamagedImageError(
            f"The image {name} is damaged or of an unsupported kind ({error}): save it again as JPEG or PNG."
        ) from error


def image_size(file: IO[bytes], *, name: str) -> tuple[int, int]:
    """The size that `decode_image` will give an image, from the head of its file.

    Args:
        file: open at its start.
        name: how messages call this image, such as its path.

    Returns:
        Height and width in pixels, EXIF rotation applied.

    Raises:
        DamagedImageError: the head is damaged or that of no image.
    """
    try:
        with Image.open(file, formats=_known_formats()) as image:
            width, height = image.size
            return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)
    except Exception as error:
        raise DamagedImageError(f"The size of the image {name} cannot be read: it is damaged or no image.") from error


def find_images(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Lists the image files that a person named.

    Args:
        paths: files, kept as they are whatever their extension, and folders, searched recursively (through symbolic
            links too) for the extensions in `EXTENSIONS`, in sorted order; hidden files and folders are left out.

    Returns:
        The files in the order given; a file that is named twice appears once.

    Raises:
        InputError: a path does not exist, or a folder holds no image.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    found: dict[str, Path] = {}  # by absolute path
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(map(Path, image_files(path)))
            if not files:
                raise InputError(f"The folder {path} holds no image ({', '.join(EXTENSIONS)}).")
        elif path.exists():
            files = [path]
        else:
            raise InputError(f"There is no file or folder {path}.")
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def image_files(folder: str | os.PathLike[str]) -> list[str]:
    """Lists the image files in a folder and the folders below it, in no particular order; see `find_images`.

    Raises:
        InputError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"Cannot list the folder {error.filename}: {error.strerror}.") from error

    files: list[str] = []
    visited: set[str] = set()  # a link may point back to a folder above it
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            os.path.join(parent, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS)
        ]
    return files


@functools.cache
def _known_formats() -> list[str]:
    """`FORMATS` without those that this build of Pillow lacks, whose names `Image.open` would reject."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Damaged EXIF data, frequent in photographs from the web, do not make the pixels unreadable.
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    try:
        # Pillow's function copies an image that needs no turning.
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    except Exception:  # as in `_orientation`
        return image


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Converts any mode to RGB; the file's format tells the range of the wide ones."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255 with rounding; Pillow's own conversion would clip."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
