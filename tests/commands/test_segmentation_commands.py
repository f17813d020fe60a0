"""Segmentation as a person runs it: scenes are made, a tiny model is trained, evaluated, and shown images."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from msvmamba_jax import inference_function
from msvmamba_jax.checkpoint import load_checkpoint, read_description
from msvmamba_jax.data.images import read_image

pytest.importorskip("cv2")

TINY = (
    "--config=configs/shapes_segmentation.py", "--config.model.width=8", "--config.model.depths=(1,1,1,1)",
    "--config.model.channels=8", "--config.model.auxiliary_channels=8", "--config.data.crop=48",
    "--config.data.scale=(96, 48)", "--config.batch_size=4", "--config.evaluation_per_device=2",
    "--config.optimizer.warmup=1 step", "--config.log_every=1 step", "--config.evaluate_every=4 steps",
    "--config.save_every=2 steps", "--config.pictures=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(call, tmp_path_factory):
    """Eight training images, and five for evaluation in three sizes."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    call("scripts/make_scenes_dataset.py", root, "--train=8", "--val=5", "--low=40", "--high=60", "--processes=1")
    for kind, extension in (("images", "jpg"), ("annotations", "png")):
        files = sorted((root / kind / "validation").iterdir())
        assert all(file.suffix == f".{extension}" for file in files)
        for file, size in zip(files, [(50, 40), (40, 55), (50, 40), (50, 40), (44, 44)], strict=True):
            with Image.open(file) as image:
                image.load()
            image.crop((0, 0, *size)).save(file)
    return root


@pytest.fixture(scope="module")
def trained(call, scenes, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "scenes"
    options = (*TINY, f"--config.data.root={scenes}", f"--workdir={workdir}")
    out = call("-m", "msvmamba_jax.train", *options, "--config.duration=2 steps")
    assert "Training msvmamba_nano (segmentation), from the start" in out
    assert "no averaged weights" in out
    out = call("-m", "msvmamba_jax.train", *options, "--config.duration=4 steps")
    assert "going on from step 2" in out
    return workdir


def test_outputs_of_a_run(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    for line in train:
        parts = line["train/decode_loss"] + line["train/auxiliary_loss"]
        assert line["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 <= line["train/pixel_accuracy"] <= 1
    evaluations = [line for line in lines if "eval/mIoU" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert all(line["eval/images"] == 5 for line in evaluations)
    assert not any("eval_ema" in key for line in lines for key in line)
    with Image.open(trained / "pictures" / "eval_00000004.png") as picture:
        assert picture.height > 2 * 400  # two images, enlarged
    description, weights = load_checkpoint(trained)
    assert (description.task, len(description.class_names)) == ("segmentation", 20)
    assert {"mean", "var"} < weights["decode_head"]["fusion"]["bn"].keys()
    assert np.any(weights["decode_head"]["fusion"]["bn"]["mean"])  # has moved from zero


@pytest.fixture(scope="module")
def exact(call, scenes, trained, tmp_path_factory):
    report = tmp_path_factory.mktemp("report") / "exact.json"
    out = call(
        "-m", "msvmamba_jax.evaluate", *TINY, f"--config.data.root={scenes}", f"--checkpoint={trained}",
        "--config.data.bucket=0", f"--json={report}",
    )  # fmt: skip
    return out, json.loads(report.read_text())


def test_exact_evaluation_counts_every_pixel_once(exact, scenes, trained):
    """At the images' own sizes, against the inference function and NumPy."""
    out, report = exact
    infer = inference_function(trained)
    confusion = np.zeros((20, 20), np.int64)
    different = 0
    for path in sorted((scenes / "images" / "validation").iterdir()):
        labels = read_image((scenes / "annotations" / "validation" / path.name).with_suffix(".png"))[..., 0].astype(int)
        found = np.asarray(infer(read_image(path)[None])["labels"])[0]
        assert found.shape == labels.shape
        known = labels > 0
        np.add.at(confusion, (labels[known] - 1, found[known]), 1)
        different += labels.size
    truth, hits = confusion.sum(1), confusion.diagonal()
    assert [row["pixels"] for row in report["raw"]["per_class"]] == truth.tolist()
    # Images are resized on the device here, by OpenCV there: a few pixels on borders differ.
    assert report["raw"]["pixel_accuracy"] == pytest.approx(hits.sum() / truth.sum(), abs=0.01)
    assert report["raw"]["images"] == 5
    assert report["raw"]["mIoU"] == pytest.approx(np.mean([
        row["iou"] for row in report["raw"]["per_class"] if row["iou"] is not None
    ]))  # fmt: skip
    names = read_description(trained).class_names
    table = out.splitlines()[-21:]
    assert table[0].split() == ["name", "iou", "accuracy", "pixels"]
    assert [line.split()[0] for line in table[1:]] == [name.split()[0] for name in names]


@pytest.mark.nightly
def test_buckets_and_views_come_close(call, scenes, trained, tmp_path, exact):
    for name, option in (("bucket", "--config.data.bucket=16"), ("tta", "--config.data.tta=true")):
        report = tmp_path / f"{name}.json"
        call(
            "-m", "msvmamba_jax.evaluate", *TINY, f"--config.data.root={scenes}", f"--checkpoint={trained}",
            "--config.data.bucket=0", option, f"--json={report}",
        )  # fmt: skip
        found = json.loads(report.read_text())["raw"]
        assert found["images"] == 5
        assert found["pixel_accuracy"] == pytest.approx(exact[1]["raw"]["pixel_accuracy"], rel=0.3)


def test_predict(call, scenes, trained, tmp_path):
    images = scenes / "images" / "validation"
    first = sorted(images.iterdir())[0]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / first.name).write_bytes(first.read_bytes())
    out = call("-m", "msvmamba_jax.predict", trained, first, tmp_path / "again", "--output", tmp_path / "out")
    assert out.count("%") > 1
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["overlay"] for entry in predictions] == [f"{first.stem}_overlay.png", f"{first.stem}_2_overlay.png"]
    with Image.open(tmp_path / "out" / predictions[0]["labels"]) as label_map:
        labels = np.asarray(label_map)
        assert label_map.mode == "P"
    infer = inference_function(trained)
    with jax.default_device(jax.devices("cpu")[0]):
        found = np.asarray(infer(read_image(first)[None])["labels"])[0]
    assert (labels == found).mean() > 0.999
    counts = np.bincount(labels.ravel(), minlength=20)
    top = predictions[0]["classes"][0]
    assert (top["label"], top["part"]) == (counts.argmax(), pytest.approx(counts.max() / labels.size))
    with Image.open(tmp_path / "out" / predictions[0]["overlay"]) as overlay:
        assert overlay.width > 400


def test_predict_a_thin_image(call, trained, tmp_path):
    """Whose short side would be less than a patch of the network."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 400, 3), np.uint8)).save(tmp_path / "line.png")
    call("-m", "msvmamba_jax.predict", trained, tmp_path / "line.png", "--output", tmp_path / "out")
    with Image.open(tmp_path / "out" / "line_labels.png") as label_map:
        assert label_map.size == (400, 3)


def test_a_classifier_s_configuration_is_for_another_task(call, trained):
    message = call("-m", "msvmamba_jax.evaluate", "--config=configs/digits.py", f"--checkpoint={trained}", status=1)
    assert "the checkpoint is for the task 'segmentation', but the configuration for 'classification'" in message
    assert message.count("\n") == 1


def test_a_label_beyond_the_classes(call, scenes, trained, tmp_path):
    broken = tmp_path / "scenes"
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (broken / kind / split).mkdir(parents=True)
            for path in (scenes / kind / split).iterdir():
                (broken / kind / split / path.name).write_bytes(path.read_bytes())
    (broken / "classes.txt").write_text("one\ntwo\n")
    message = call(
        "-m", "msvmamba_jax.train", *TINY, f"--config.data.root={broken}", f"--workdir={tmp_path / 'run'}",
        "--config.duration=2 steps", status=1,
    )  # fmt: skip
    [line] = [line for line in message.splitlines() if line.startswith("error: ")]
    assert "annotations/training/scene_" in line
    assert "2 classes only allow 0 to 2" in line
    assert "Traceback" not in message
