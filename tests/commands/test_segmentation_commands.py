"""Segmentation as a person runs it: scenes are made, a tiny model is trained, evaluated, and shown images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from command_runs import SEGMENTATION, run_command, succeed
from PIL import Image

from msvmamba_jax import inference_function
from msvmamba_jax.checkpoint import load_checkpoint, read_description
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.data.images import read_image

pytest.importorskip("cv2")


def test_a_run_says_what_it_does(segmenter):
    out = (segmenter / "printed.txt").read_text()
    assert "Training msvmamba_nano (segmentation), from the start" in out
    assert "no averaged weights" in out


@pytest.mark.nightly
def test_a_run_goes_on(scenes, segmenter, tmp_path):
    shutil.copytree(segmenter, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    out = succeed("train", *SEGMENTATION, f"--config.data.root={scenes}", f"--workdir={tmp_path / 'run'}")
    assert "Training msvmamba_nano (segmentation), going on from step 2" in out


def test_outputs_of_a_run(segmenter):
    lines = [json.loads(line) for line in (segmenter / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "train/loss" in line]
    for line in train:
        parts = line["train/decode_loss"] + line["train/auxiliary_loss"]
        assert line["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 <= line["train/pixel_accuracy"] <= 1
    evaluations = [line for line in lines if "eval/mIoU" in line]
    assert [line["step"] for line in evaluations] == [3]
    assert all(line["eval/images"] == 5 for line in evaluations)
    assert not any("eval_ema" in key for line in lines for key in line)
    with Image.open(segmenter / "pictures" / "eval_00000003.png") as picture:
        assert picture.height > 2 * 400  # two images, enlarged
    description, weights = load_checkpoint(segmenter)
    assert (description.task, len(description.class_names)) == ("segmentation", 20)
    assert {"mean", "var"} < weights["decode_head"]["fusion"]["bn"].keys()
    assert np.any(weights["decode_head"]["fusion"]["bn"]["mean"])  # has moved from zero


@pytest.fixture(scope="module")
def exact(scenes, segmenter, tmp_path_factory):
    report = tmp_path_factory.mktemp("report") / "exact.json"
    options = (f"--config.data.root={scenes}", f"--checkpoint={segmenter}", "--config.data.bucket=0")
    out = succeed("evaluate", *SEGMENTATION, *options, f"--json={report}")
    return out, json.loads(report.read_text())


def test_exact_evaluation_counts_every_pixel_once(exact, scenes, segmenter):
    """At the images' own sizes, against the inference function and NumPy."""
    out, report = exact
    infer = inference_function(segmenter)
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
    names = read_description(segmenter).class_names
    table = out.splitlines()[-21:]
    assert table[0].split() == ["name", "iou", "accuracy", "pixels"]
    assert [line.split()[0] for line in table[1:]] == [name.split()[0] for name in names]


@pytest.mark.nightly
@pytest.mark.parametrize("options", [{"bucket": 16}, {"tta": True}])
def test_buckets_and_views_count_every_pixel_once(scenes, segmenter, tmp_path, exact, options):
    """Pixels are counted by their prepared labels, whichever class wins."""
    report = tmp_path / "report.json"
    given = [f"--config.data.{name}={value}" for name, value in options.items()]
    succeed(
        "evaluate", *SEGMENTATION, f"--config.data.root={scenes}", f"--checkpoint={segmenter}", *given,
        f"--json={report}",
    )  # fmt: skip
    found = json.loads(report.read_text())["raw"]
    data = {"source": "segmentation_folder", "root": str(scenes), "scale": (64, 32), "crop": 32, **options}
    dataset = load_dataset(data | {"reduce_zero_label": "true"})
    labels = [dataset.prepare(record)["labels"].ravel() for record in dataset.evaluation]
    counts = np.bincount(np.concatenate(labels), minlength=256)[:20]
    assert found["images"] == len(labels) == 5
    assert [row["pixels"] for row in found["per_class"]] == counts.tolist()
    before = [row["pixels"] for row in exact[1]["raw"]["per_class"]]
    assert (counts.tolist() == before) == ("tta" in options)


def test_predict(scenes, segmenter, tmp_path):
    images = scenes / "images" / "validation"
    first = sorted(images.iterdir())[0]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / first.name).write_bytes(first.read_bytes())
    out = succeed("predict", segmenter, first, tmp_path / "again", "--output", tmp_path / "out")
    assert out.count("%") > 1
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["overlay"] for entry in predictions] == [f"{first.stem}_overlay.png", f"{first.stem}_2_overlay.png"]
    with Image.open(tmp_path / "out" / predictions[0]["labels"]) as label_map:
        labels = np.asarray(label_map)
        assert label_map.mode == "P"
    infer = inference_function(segmenter)
    found = np.asarray(infer(read_image(first)[None])["labels"])[0]
    assert (labels == found).mean() > 0.999
    counts = np.bincount(labels.ravel(), minlength=20)
    top = predictions[0]["classes"][0]
    assert (top["label"], top["part"]) == (counts.argmax(), pytest.approx(counts.max() / labels.size))
    with Image.open(tmp_path / "out" / predictions[0]["overlay"]) as overlay:
        assert overlay.width > 400


def test_predict_a_thin_image(segmenter, tmp_path):
    """Whose short side would be less than a patch of the network."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 400, 3), np.uint8)).save(tmp_path / "line.png")
    succeed("predict", segmenter, tmp_path / "line.png", "--output", tmp_path / "out")
    with Image.open(tmp_path / "out" / "line_labels.png") as label_map:
        assert label_map.size == (400, 3)


def test_a_classifier_s_configuration_is_for_another_task(segmenter):
    message = run_command("evaluate", "--config=configs/digits.py", f"--checkpoint={segmenter}").message
    assert "the checkpoint is for the task 'segmentation', but the configuration for 'classification'" in message


def test_detections_are_of_detection_only(segmenter, tmp_path):
    given = ("--config=configs/digits.py", f"--checkpoint={segmenter}", f"--detections={tmp_path / 'x.json'}")
    assert "--detections is for detection" in run_command("evaluate", *given).message


def test_a_label_beyond_the_classes(scenes, tmp_path):
    broken = tmp_path / "scenes"
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (broken / kind / split).mkdir(parents=True)
            for path in (scenes / kind / split).iterdir():
                (broken / kind / split / path.name).write_bytes(path.read_bytes())
    (broken / "classes.txt").write_text("one\ntwo\n")
    outcome = run_command(
        "train", *SEGMENTATION, f"--config.data.root={broken}", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert outcome.status == 1
    [line] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "annotations/training/scene_" in line
    assert "2 classes only allow 0 to 2" in line
    assert "Traceback" not in outcome.err
