"""Detection as a person runs it: objects are made, a tiny model is trained, evaluated, and shown images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.checkpoint import load_checkpoint
from msvmamba_jax.data.coco import load_coco
from msvmamba_jax.data.images import read_image

pytest.importorskip("cv2")
pytest.importorskip("pycocotools")

TINY = (
    "--config=configs/shapes_detection.py", "--config.model.width=8", "--config.model.depths=(1,1,1,1)",
    "--config.model.channels=8", "--config.model.hidden=8", "--config.data.scale=(96, 64)", "--config.batch_size=2",
    "--config.data.bucket=96", "--config.regions.proposals=(20,10)", "--config.regions.evaluation_proposals=(20,10)",
    "--config.regions.anchor_samples=16", "--config.regions.region_samples=8", "--config.evaluation_per_device=2",
    "--config.optimizer.warmup=1 step", "--config.log_every=1 step", "--config.evaluate_every=4 steps",
    "--config.save_every=2 steps", "--config.pictures=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def objects(call, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "objects"
    call("scripts/make_objects_dataset.py", root, "--train=12", "--val=5", "--low=64", "--high=96", "--processes=1")
    return root


@pytest.fixture(scope="module")
def trained(call, objects, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "objects"
    options = (*TINY, f"--config.data.root={objects}", f"--workdir={workdir}")
    out = call("-m", "msvmamba_jax.train", *options, "--config.duration=2 steps")
    assert "Training msvmamba_nano (detection), from the start" in out
    out = call("-m", "msvmamba_jax.train", *options, "--config.duration=4 steps")
    assert "going on from step 2" in out
    return workdir


def test_outputs_of_a_run(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    parts = ("rpn_score_loss", "rpn_box_loss", "score_loss", "box_loss", "mask_loss")
    for line in lines:
        if "train/loss" in line:
            assert line["train/loss"] == pytest.approx(sum(line[f"train/{part}"] for part in parts), rel=1e-5)
    evaluations = [line for line in lines if "eval/bbox_mAP" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    for line in evaluations:
        assert line["eval/images"] == 5
        assert 0 <= line["eval/segm_mAP"] <= line["eval/segm_mAP_50"] <= 1
    with Image.open(trained / "pictures" / "eval_00000004.png") as picture:
        assert picture.width > 400
    description, weights = load_checkpoint(trained)
    assert (description.task, len(description.class_names)) == ("detection", 10)
    assert weights["mask_head"]["score"]["kernel"].shape == (8, 10)


def test_evaluation_writes_cocos_results(call, objects, trained, tmp_path):
    """Exactly, on the images' own shapes; every image once, and the metrics that pycocotools gives for the file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out = call(
        "-m", "msvmamba_jax.evaluate", *TINY, f"--config.data.root={objects}", f"--checkpoint={trained}",
        "--config.data.bucket=0", f"--json={tmp_path / 'report.json'}", f"--detections={tmp_path / 'found.json'}",
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())["raw"]
    assert report["images"] == 5
    assert [row["name"] for row in report["per_class"]] == list(load_coco(objects)[2])
    assert "bbox" in out
    truth = COCO(str(objects / "annotations" / "instances_val2017.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert {entry["image_id"] for entry in found} <= set(truth.getImgIds())
    assert {entry["category_id"] for entry in found} <= set(truth.getCatIds())
    if found:
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert report["bbox_mAP"] == pytest.approx(max(evaluation.stats[0], 0), abs=1e-6)


# As a process of its own: compiled with other options than the command's, the scores of a model that has learnt nothing
# come out in another order.
INFER = """
import sys
import numpy as np
from msvmamba_jax import inference_function
from msvmamba_jax.data.images import read_image

checkpoint, image, output = sys.argv[1:]
np.savez(output, **inference_function(checkpoint)(read_image(image)[None]))
"""


def test_predict(call, objects, trained, tmp_path):
    image = sorted((objects / "val2017").iterdir())[0]
    out = call("-m", "msvmamba_jax.predict", trained, image, "--output", tmp_path / "out", "--threshold=0.0", "--top=2")
    assert str(image) in out
    [prediction] = json.loads((tmp_path / "out" / "predictions.json").read_text())
    call("-c", INFER, trained, image, tmp_path / "found.npz")
    with np.load(tmp_path / "found.npz") as arrays:
        found = {name: array[0] for name, array in arrays.items()}
    count = int(found["valid"].sum())
    assert len(prediction["objects"]) == count
    height, width = read_image(image).shape[:2]
    for entry, box, score in zip(prediction["objects"], found["boxes"], found["scores"], strict=False):
        np.testing.assert_allclose(entry["box"], box, atol=0.05)
        assert entry["score"] == pytest.approx(float(score), abs=1e-3)
        assert sum(entry["mask"]["counts"]) == height * width
    with Image.open(tmp_path / "out" / prediction["picture"]) as picture:
        assert picture.width >= width


def test_padding_to_buckets_changes_little(call, objects, trained, tmp_path):
    """The network sees more zeros; of a model that has learnt nothing, other objects may come first."""
    found = []
    for bucket in (0, 96):
        output = tmp_path / f"{bucket}.json"
        call(
            "-m", "msvmamba_jax.evaluate", *TINY, f"--config.data.root={objects}", f"--checkpoint={trained}",
            f"--config.data.bucket={bucket}", f"--detections={output}",
        )  # fmt: skip
        scores: dict[int, list[float]] = {}
        for entry in json.loads(output.read_text()):
            scores.setdefault(entry["image_id"], []).append(entry["score"])
        found.append(scores)
    assert len(found[0]) == 5
    for image, scores in found[0].items():
        assert max(scores) == pytest.approx(max(found[1][image]), rel=0.1)


def test_cut_off_annotations(call, objects, tmp_path):
    broken = tmp_path / "objects"
    (broken / "annotations").mkdir(parents=True)
    for name in ("train2017", "val2017"):
        (broken / name).symlink_to(objects / name)
        source = (objects / "annotations" / f"instances_{name}.json").read_text()
        (broken / "annotations" / f"instances_{name}.json").write_text(source[: len(source) // 2])
    message = call(
        "-m", "msvmamba_jax.train", *TINY, f"--config.data.root={broken}", f"--workdir={tmp_path / 'run'}",
        "--config.duration=2 steps", status=1,
    )  # fmt: skip
    assert message.count("\n") == 1
    assert message.startswith("error: ")
    assert "instances_val2017.json" in message
    assert not (tmp_path / "run").exists()


def test_detections_are_of_detection_only(call, trained, tmp_path):
    message = call(
        "-m", "msvmamba_jax.evaluate", "--config=configs/digits.py", f"--checkpoint={trained}",
        f"--detections={tmp_path / 'x.json'}", status=1,
    )  # fmt: skip
    assert "--detections is for detection" in message
