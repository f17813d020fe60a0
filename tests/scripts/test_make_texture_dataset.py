"""The made-up image folder: reproducible, in ImageNet's shape, and not to be told apart by colour."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_scripts import contents, load_script, run
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from msvmamba_jax.data.folder import load_folder

textures = load_script("make_texture_dataset")


def test_folder_is_shaped_like_imagenet_and_reproducible(monkeypatch, tmp_path):
    run(monkeypatch, textures, tmp_path / "one", "--train", 2, "--val", 1, "--processes", 1)
    run(monkeypatch, textures, tmp_path / "two", "--train", 2, "--val", 1, "--processes", 2)
    one = contents(tmp_path / "one")
    assert len(one) == 36
    assert len(set(one.values())) == 36
    assert contents(tmp_path / "two") == one
    train, val, names = load_folder(tmp_path / "one")
    assert (len(train), len(val), names) == (24, 12, tuple(sorted(textures.TEXTURES)))
    kinds = set()
    for index in range(len(train)):
        with Image.open(train.path(index)) as image:
            kinds.add((image.format, image.mode))
            assert all(200 <= side <= 600 for side in image.size)
    assert {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")} <= kinds


def test_colours_do_not_tell_the_class():
    features, labels = [], []
    for label, name in enumerate(textures.TEXTURES):
        for number in range(40):
            pixels = np.asarray(textures.draw(name, np.random.default_rng([label, number]), low=48, high=64))
            histograms = [np.histogram(pixels[..., c], 8, (0, 256))[0] / pixels[..., c].size for c in range(3)]
            features.append(np.concatenate(histograms))
            labels.append(label)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    train = np.arange(len(labels)) % 40 < 28
    features, labels = np.array(features), np.array(labels)
    classifier.fit(features[train], labels[train])
    assert classifier.score(features[~train], labels[~train]) < 0.2  # chance: 0.083


@pytest.mark.parametrize("content", ["folder", "file"])
def test_nothing_is_overwritten(monkeypatch, tmp_path, content):
    root = tmp_path / "data"
    if content == "folder":
        root.mkdir()
        (root / "mine.txt").write_text("mine")
    else:
        root.write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, textures, root)
    assert "exists and is not empty" in str(stopped.value)
    assert (root if content == "file" else root / "mine.txt").read_text() == "mine"
    with pytest.raises(SystemExit):
        run(monkeypatch, textures, tmp_path / "other", "--train", 0)
    assert not (tmp_path / "other").exists()
