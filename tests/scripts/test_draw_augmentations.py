"""The sheet of augmented images: whole originals on the left, and a sentence where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dataset_scripts import load_script
from PIL import Image

script = load_script("draw_augmentations")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs the script in this process: returncode, stdout and stderr."""

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["draw_augmentations.py", *map(str, arguments)])
        capsys.readouterr()
        status, message = 0, ""
        try:
            script.main()
        except SystemExit as exit_:  # with a sentence, which Python prints before it ends with status 1
            status, message = (1, exit_.code) if isinstance(exit_.code, str) else (exit_.code, "")
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err + message)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_sheet(run: Callable[..., SimpleNamespace], folder: Path, tmp_path: Path) -> None:
    options = ("--images", 2, "--variants", 3, "--size", 64)
    done = run(folder, "--output", tmp_path / "sheet.png", *options)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 images" in done.stdout
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert page.shape == (20 + 2 * 68 + 4, 4 + 4 * 68, 3)
    np.testing.assert_array_equal(page[20 : 20 + 64, 4 : 4 + 32], np.asarray(Image.open(folder / "0.png")))
    cells = {page[20 + 68 * row :][:64, 4 + 68 * column :][:, :64].tobytes() for row in (0, 1) for column in range(4)}
    assert len(cells) == 8
    for output, seed in (("again.png", 0), ("other.png", 1)):
        assert run(folder, "--output", tmp_path / output, "--seed", seed, *options).returncode == 0
        assert (np.asarray(Image.open(tmp_path / output)) == page).all() == (seed == 0)


def test_erasing_and_mixing_are_shown(run: Callable[..., SimpleNamespace], folder: Path, tmp_path: Path) -> None:
    """Black images stay black until they are erased, and grey ones show what they were mixed with."""
    for number in range(2):
        Image.new("RGB", (64, 64), (255 * number,) * 3).save(folder / f"{number}.png")
    (folder / "2.png").unlink()
    plain = ("--images", 2, "--variants", 4, "--size", 32, "--randaugment", "", "--erase_probability", 0, "--mixup", 0)
    values = {}
    for name, changed in (("none", ()), ("erased", ("--erase_probability", 1)), ("mixed", ("--mixup", 5))):
        done = run(folder, "--output", tmp_path / "sheet.png", *plain, "--cutmix", 0, *changed)
        assert done.returncode == 0, done.stderr
        black = np.asarray(Image.open(tmp_path / "sheet.png"))[20 : 20 + 32, 4 + 36 :]
        cells = [black[:, 36 * column :][:, :32] for column in range(4)]
        values[name] = {len(np.unique(cell)) for cell in cells}, {int(cell.max()) for cell in cells}
    assert values["none"] == ({1}, {0})
    assert min(values["erased"][0]) > 50  # noise in a box
    assert values["mixed"][0] == {1}  # one weight for the whole image, drawn anew for every batch
    assert len(values["mixed"][1]) == 4
    assert min(values["mixed"][1]) > 0


def test_help_and_errors(run: Callable[..., SimpleNamespace], folder: Path, tmp_path: Path) -> None:
    assert "--randaugment" in run("--help").stdout
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere"),
        ((folder, "--randaugment", "strong"), "rand-m9-mstd0.5-inc1"),
        ((folder, "--output", tmp_path / "no" / "sheet.png"), "Cannot write"),
        ((folder, "--images", 0), "at least 1"),
        ((folder, "--mixup", -1), "config.mix.mixup"),
    ):
        done = run(*arguments)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr
