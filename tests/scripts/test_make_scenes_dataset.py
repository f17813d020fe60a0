"""The made-up segmentation data set: in ADE20K's form, reproducible, and read back with the labels that were drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_scripts import check_options, check_that_nothing_is_overwritten, contents, load_script, run
from PIL import Image

from msvmamba_jax.data.scenes import CLASSES
from msvmamba_jax.data.segmentation import load_segmentation_folder

script = load_script("make_scenes_dataset")


def test_the_folder_is_read_back_and_reproducible(monkeypatch, tmp_path):
    sizes = ("--low", 40, "--high", 64)
    run(monkeypatch, script, tmp_path / "one", "--train", 5, "--val", 3, "--processes", 1, *sizes)
    run(monkeypatch, script, tmp_path / "two", "--train", 5, "--val", 3, "--processes", 2, *sizes)
    assert len(contents(tmp_path / "one")) == 17
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    run(monkeypatch, script, tmp_path / "three", "--train", 1, "--val", 1, "--seed", 1, "--processes", 1, *sizes)
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
    assert {side for shape in shapes for side in shape} == {40, 52, 64}
    assert not np.array_equal(train[0]["labels"], evaluation[0]["labels"])


def test_preview(monkeypatch, tmp_path, capsys):
    options = ("--train", 1, "--val", 1, "--low", 40, "--high", 50, "--processes", 1)
    run(monkeypatch, script, tmp_path / "data", "--preview", tmp_path / "scenes.png", *options)
    assert "2 images of 20 classes" in capsys.readouterr().out
    with Image.open(tmp_path / "scenes.png") as sheet:
        assert sheet.width > 2 * 2 * 400
        assert sheet.height > 3 * 400
        colours = sheet.convert("RGB").getcolors(sheet.width * sheet.height)
    assert len(colours) > 1000
    with pytest.raises(SystemExit, match="cannot write"):
        run(monkeypatch, script, tmp_path / "other", "--preview", tmp_path / "scenes.unknown", *options)


def test_nothing_is_overwritten_and_options_are_checked(monkeypatch, tmp_path):
    check_that_nothing_is_overwritten(monkeypatch, script, tmp_path / "data")
    check_options(monkeypatch, script, tmp_path / "other", least=32)
