"""Detection as a person runs it: objects are made, a tiny model is trained, evaluated, and shown images."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from command_runs import DETECTION, run_command, succeed
from PIL import Image

from msvmamba_jax import inference_function
from msvmamba_jax.checkpoint import load_checkpoint
from msvmamba_jax.data.coco import load_coco
from msvmamba_jax.data.images import read_image

pytest.importorskip("cv2")
pytest.importorskip("pycocotools")


@pytest.mark.nightly
def test_a_run_goes_on(objects, detector, tmp_path):
    shutil.copytree(detector, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    out = succeed("train", *DETECTION, f"--config.data.root={objects}", f"--workdir={tmp_path / 'run'}")
    assert "Training msvmamba_nano (detection), going on from step 2" in out


def test_outputs_of_a_run(detector):
    lines = [json.loads(line) for line in (detector / "metrics.jsonl").read_text().splitlines()]
    parts = ("rpn_score_loss", "rpn_box_loss", "score_loss", "box_loss", "mask_loss")
    for line in lines:
        if "train/loss" in line:
            assert line["train/loss"] == pytest.approx(sum(line[f"train/{part}"] for part in parts), rel=1e-5)
    evaluations = [line for line in lines if "eval/bbox_mAP" in line]
    assert [line["step"] for line in evaluations] == [3]
    for line in evaluations:
        assert line["eval/images"] == 5
        assert 0 <= line["eval/segm_mAP"] <= line["eval/segm_mAP_50"] <= 1
    with Image.open(detector / "pictures" / "eval_00000003.png") as picture:
        assert picture.width > 400
    description, weights = load_checkpoint(detector)
    assert (description.task, len(description.class_names)) == ("detection", 10)
    assert weights["mask_head"]["score"]["kernel"].shape == (8, 10)


@pytest.fixture(scope="module")
def exact(objects, detector, tmp_path_factory):
    """Evaluated without padding: standard output, the report and the detections."""
    folder = tmp_path_factory.mktemp("exact")
    out = succeed(
        "evaluate", *DETECTION, f"--config.data.root={objects}", f"--checkpoint={detector}",
        f"--json={folder / 'report.json'}", f"--detections={folder / 'found.json'}",
    )  # fmt: skip
    return out, json.loads((folder / "report.json").read_text())["raw"], folder / "found.json"


def test_evaluation_writes_cocos_results(exact, objects):
    """Every image once, and the metrics that pycocotools gives for the file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out, report, path = exact
    assert report["images"] == 5
    assert [row["name"] for row in report["per_class"]] == list(load_coco(objects)[2])
    assert "bbox" in out
    truth = COCO(str(objects / "annotations" / "instances_val2017.json"))
    found = json.loads(path.read_text())
    assert found
    assert {entry["image_id"] for entry in found} <= set(truth.getImgIds())
    assert {entry["category_id"] for entry in found} <= set(truth.getCatIds())
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert report["bbox_mAP"] == pytest.approx(max(evaluation.stats[0], 0), abs=1e-6)


def test_predict(objects, detector, tmp_path):
    image = sorted((objects / "val2017").iterdir())[0]
    out = succeed("predict", detector, image, "--output", tmp_path / "out", "--threshold=0.0", "--top=2")
    assert str(image) in out
    [prediction] = json.loads((tmp_path / "out" / "predictions.json").read_text())
    jax.clear_caches()  # traced anew, it is the program that the command left in the compilation cache
    found = {
        name: np.asarray(array[0]) for name, array in inference_function(detector)(read_image(image)[None]).items()
    }
    count = int(found["valid"].sum())
    assert len(prediction["objects"]) == count
    height, width = read_image(image).shape[:2]
    for entry, box, score in zip(prediction["objects"], found["boxes"], found["scores"], strict=False):
        np.testing.assert_allclose(entry["box"], box, atol=0.05)
        assert entry["score"] == pytest.approx(float(score), abs=1e-3)
        assert sum(entry["mask"]["counts"]) == height * width
    with Image.open(tmp_path / "out" / prediction["picture"]) as picture:
        assert picture.width >= width


@pytest.mark.nightly
def test_padding_to_buckets_changes_little(exact, objects, detector, tmp_path):
    """The network sees more zeros, but boxes stay within the images; other objects of such a model may come first."""
    padded = tmp_path / "padded.json"
    options = (f"--config.data.root={objects}", f"--checkpoint={detector}", "--config.data.bucket=96")
    succeed("evaluate", *DETECTION, *options, f"--detections={padded}")
    best: list[dict[int, float]] = []
    for path in (exact[2], padded):
        best.append({})
        for entry in json.loads(path.read_text()):
            x, y, width, height = entry["bbox"]
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= 64.1
            best[-1][entry["image_id"]] = max(entry["score"], best[-1].get(entry["image_id"], 0))
    assert len(best[0]) == 5
    assert best[1] == pytest.approx(best[0], rel=0.1)


def test_cut_off_annotations(objects, tmp_path):
    broken = tmp_path / "objects"
    (broken / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        (broken / name).symlink_to(objects / name)
        source = (objects / "annotations" / f"instances_{name}.json").read_text()
        (broken / "annotations" / f"instances_{name}.json").write_text(source[: len(source) // 2])
    message = run_command(
        "train", *DETECTION, f"--config.data.root={broken}", f"--workdir={tmp_path / 'run'}",
    ).message  # fmt: skip
    assert "instances_val2017.json" in message
    assert not (tmp_path / "run").exists()
