"""Every kind of image file becomes upright uint8 RGB; everything else becomes one sentence that names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data.images import decode_image, find_images, read_image
from msvmamba_jax.errors import InputError


def gradient(height: int = 6, width: int = 9) -> np.ndarray:
    """An RGB image in which every row, column and channel differs."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([20 * rows + 10, 25 * columns + 5, 10 * rows + 15 * columns], axis=-1).astype(np.uint8)


def png_bytes(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def assert_one_sentence(error: pytest.ExceptionInfo[InputError], path: Path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message


def test_png_is_read_exactly(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert image.flags.writeable
    np.testing.assert_array_equal(image, gradient())
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), gradient())
    np.testing.assert_array_equal(decode_image((tmp_path / "a.png").read_bytes(), name="a"), gradient())


def test_jpeg_is_close(tmp_path: Path) -> None:
    pixels = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - pixels).max() <= 2


def test_content_decides_the_format(tmp_path: Path) -> None:
    (tmp_path / "really_a_png.jpg").write_bytes(png_bytes(Image.fromarray(gradient())))
    np.testing.assert_array_equal(read_image(tmp_path / "really_a_png.jpg"), gradient())


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(tmp_path: Path, mode: str) -> None:
    grey = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))


def test_palette(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[255, 0, 0], [0, 255, 0], [10, 20, 30]]])


def test_palette_with_transparency_shows_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.save(tmp_path / "index.png", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "index.png"), [[[255, 0, 0], [255, 255, 255], [10, 20, 30]]])
    image.save(tmp_path / "bytes.png", transparency=bytes([255, 255, 0]))
    np.testing.assert_array_equal(read_image(tmp_path / "bytes.png"), [[[255, 0, 0], [0, 255, 0], [255, 255, 255]]])


def test_alpha_is_composited_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 0, 100, 255], [200, 0, 100, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    # 51 / 255 = 0.2 of black over white is 204.
    expected = [[[200, 0, 100], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[90, 255], [90, 0]]], np.uint8), mode="LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[90] * 3, [255] * 3]])


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), np.stack([expected] * 3, axis=-1))


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    pixels = zlib.compress(b"\x00" + struct.pack(">HH", 1000, 2570))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"tRNS", struct.pack(">H", 1000)) + png_chunk(b"IDAT", pixels)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[255] * 3, [10] * 3]])


def test_cmyk_jpeg(tmp_path: Path) -> None:
    rgb = np.full((16, 16, 3), (250, 130, 20), np.uint8)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    # What a camera stores so that the picture, turned as the tag says, is the gradient.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(stored[orientation](gradient()))
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), gradient())


def test_damaged_exif_does_not_hide_the_image(tmp_path: Path) -> None:
    pixels = Image.fromarray(np.full((8, 8, 3), 77, np.uint8))
    pixels.save(tmp_path / "a.jpg", quality=95, exif=b"Exif\x00\x00not a tiff header at all")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.full((8, 8, 3), 77))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (5, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif"), np.zeros((4, 5, 3)))


def write_text(path: Path) -> None:
    path.write_text("This is not an image.\n" * 20)


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_truncated_jpeg(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def write_truncated_png(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path.write_bytes(png_bytes(Image.fromarray(noise))[:5000])


def write_corrupt_png(path: Path) -> None:
    data = bytearray(png_bytes(Image.fromarray(gradient(64, 64))))
    data[60:80] = bytes(20)
    path.write_bytes(data)


def write_header_only(path: Path) -> None:
    path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")


def write_bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def write_float_tiff(path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(path, "TIFF")


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        write_nothing,
        write_truncated_jpeg,
        write_truncated_png,
        write_corrupt_png,
        write_header_only,
        write_bomb,
        write_postscript,
        write_float_tiff,
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.mkdir(), id="folder"),
    ],
)
def test_what_is_no_image_is_named_in_one_sentence(tmp_path: Path, write) -> None:
    path = tmp_path / "photo.jpg"
    write(path)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert_one_sentence(error, path)


def test_formats_that_start_other_programs_are_not_opened(tmp_path: Path) -> None:
    write_postscript(tmp_path / "a.eps")
    with pytest.raises(InputError, match="not an image that can be read"):
        read_image(tmp_path / "a.eps")


def test_bomb_is_refused_even_with_pillows_check_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    write_bomb(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="too large"):
        read_image(tmp_path / "bomb.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b/2.JPEG",
        "b/1.png",
        "a.jpg",
        "b/c/3.webp",
        "notes.txt",
        ".hidden.png",
        ".cache/4.png",
        "b/._2.jpeg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_folder_is_searched_in_sorted_order(tree: Path) -> None:
    found = [path.relative_to(tree).as_posix() for path in find_images([tree])]
    assert found == ["a.jpg", "b/1.png", "b/2.JPEG", "b/c/3.webp"]


def test_files_are_kept_as_given_and_named_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert find_images(["notes.txt", "b", "a.jpg", "./a.jpg", "b/../a.jpg", tree / "b" / "1.png"]) == [
        Path("notes.txt"),
        Path("b/1.png"),
        Path("b/2.JPEG"),
        Path("b/c/3.webp"),
        Path("a.jpg"),
    ]
    assert find_images("a.jpg") == [Path("a.jpg")]
    assert find_images([]) == []


def test_links_are_followed_once(tree: Path) -> None:
    os.symlink(tree, tree / "b" / "loop")
    found = [path.relative_to(tree).as_posix() for path in find_images([tree])]
    assert found == ["a.jpg", "b/1.png", "b/2.JPEG", "b/c/3.webp"]


def test_missing_path_and_empty_folder(tree: Path) -> None:
    with pytest.raises(InputError) as error:
        find_images([tree / "a.jpg", tree / "nowhere"])
    assert_one_sentence(error, tree / "nowhere")
    (tree / "empty").mkdir()
    with pytest.raises(InputError) as error:
        find_images([tree / "empty"])
    assert_one_sentence(error, tree / "empty")
