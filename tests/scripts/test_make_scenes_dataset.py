"""The made-up segmentation data set: in ADE20K's form, reproducible, and read back with the labels that were drawn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data.scenes import CLASSES
from msvmamba_jax.data.segmentation import load_segmentation_folder

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_scenes_dataset.py"
spec = importlib.util.spec_from_file_location("make_scenes_dataset", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # worker processes find the functions under this name
spec.loader.exec_module(script)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # for the worker processes


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_scenes_dataset.py", *map(str, arguments)])
    script.main()


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_folder_is_read_back_and_reproducible(monkeypatch, tmp_path):
    sizes = ("--low", 40, "--high", 64)
    run(monkeypatch, tmp_path / "one", "--train", 5, "--val", 3, "--processes", 1, *sizes)
    run(monkeypatch, tmp_path / "two", "--train", 5, "--val", 3, "--processes", 2, *sizes)
    assert len(contents(tmp_path / "one")) == 17
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    run(monkeypatch, tmp_path / "three", "--train", 1, "--val", 1, "--seed", 1, "--processes", 1, *sizes)
    first = Path("images/training/scene_000000.jpg")
    assert (tmp_path / "three" / first).read_bytes() != (tmp_path / "one" / first).read_bytes()

    train, evaluation, names = load_segmentation_folder(tmp_path / "one", reduce_zero_label=True)
    assert (len(train), len(evaluation), names) == (5, 3, CLASSES)
    shapes = set()
    for split, part in enumerate((train, evaluation)):
        for number in range(len(part)):
            drawn, record = script.scene(split, number, seed=0, low=40, high=64), part[number]
            np.testing.assert_array_equal(record["labels"], drawn.labels)
            assert np.abs(record["image"].astype(int) - drawn.image).mean() < 16  # JPEG
            shapes.add(drawn.labels.shape)
    assert len(shapes) > 4
    assert all(40 <= side <= 64 for shape in shapes for side in shape)
    assert not np.array_equal(train[0]["labels"], evaluation[0]["labels"])


def test_preview(monkeypatch, tmp_path, capsys):
    options = ("--train", 1, "--val", 1, "--low", 40, "--high", 50, "--processes", 1)
    run(monkeypatch, tmp_path / "data", "--preview", tmp_path / "scenes.png", *options)
    assert "2 images of 20 classes" in capsys.readouterr().out
    with Image.open(tmp_path / "scenes.png") as sheet:
        assert sheet.width > 2 * 2 * 400
        assert sheet.height > 3 * 400
        colours = np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)
    assert len(colours) > 1000
    with pytest.raises(SystemExit, match="cannot write"):
        run(monkeypatch, tmp_path / "other", "--preview", tmp_path / "scenes.unknown", *options)


def test_nothing_is_overwritten_and_options_are_checked(monkeypatch, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not empty"):
        run(monkeypatch, root)
    assert list(root.iterdir()) == [root / "mine.txt"]
    for options in (("--train", 0), ("--low", 16), ("--low", 100, "--high", 99)):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / "other", *options)
    assert not (tmp_path / "other").exists()
