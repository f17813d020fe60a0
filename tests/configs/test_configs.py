"""Every configuration makes its task, and the ImageNet recipe is the original's."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from msvmamba_jax import InputError, command
from msvmamba_jax.data.augment import Augmentation
from msvmamba_jax.data.coco import CocoRecords
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.data.detection_preprocessing import DetectionPreprocessing
from msvmamba_jax.data.pipeline import Dataset
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.data.segmentation_preprocessing import SegmentationPreprocessing
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model
from msvmamba_jax.models.variants import VARIANTS, backbone_config
from msvmamba_jax.tasks.mixing import Mixing
from msvmamba_jax.tasks.registry import make_task, task_of_checkpoint
from msvmamba_jax.training.durations import make_clock
from msvmamba_jax.training.optimizer import schedule_of
from msvmamba_jax.training.pretrained import find_pretrained

FOLDER = Path(__file__).parents[2] / "configs"
SHARED = {"__init__", "ade20k", "coco", "imagenet"}
ALL = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)
IMAGENET = ["micro", "nano", "tiny", "vssm_base", "vssm_small", "vssm_tiny"]


def load(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]()


SEGMENTATION = ["ade20k_micro", "ade20k_nano", "ade20k_tiny"]
DETECTION = ["coco_micro_1x", "coco_micro_3x", "coco_nano_1x", "coco_tiny_1x", "coco_tiny_3x"]
SHAPES = ["shapes_detection", "shapes_segmentation"]
PREPROCESSING = {
    "classification": (Preprocessing(), 1000),
    "segmentation": (SegmentationPreprocessing(), 150),
    "detection": (DetectionPreprocessing(), 80),
}


def dataset(images=1_281_167, task="classification"):
    preprocessing, classes = PREPROCESSING[task]
    return Dataset(
        train=range(images),
        evaluation=NO_RECORDS if task == "detection" else range(10),
        class_names=tuple(f"class {i}" for i in range(classes)),
        preprocessing=preprocessing,
        augment=lambda record, rng: record,
        prepare=lambda record: record,
    )


NO_RECORDS = CocoRecords(
    files=None, name="none", class_names=(), category_ids=(), places=np.zeros(0, int), image_ids=np.zeros(0, int),
    sizes=np.zeros((0, 2), int), counts=np.zeros(0, int), training=False, annotations_file=None,
)  # fmt: skip


def test_all_are_there():
    assert sorted(["digits", "finetune", "textures", *SHAPES, *IMAGENET, *SEGMENTATION, *DETECTION]) == ALL


@pytest.mark.parametrize("name", ALL)
def test_makes_its_task(name):
    config = load(name)
    task = make_task(config, dataset(task=config.task))
    assert f"configs/{name}.py" in runpy.run_path(str(FOLDER / f"{name}.py"))["__doc__"]
    json.dumps(config.to_dict())  # as the workdir's config.json
    # With a block a stage: the depth takes the time, and tests of the variants hold it.
    abstract_model(lambda: task.description.build(rngs=SHAPE_KEYS, dtype=config.dtype, depths=(1, 1, 1, 1)))
    schedule_of(config, make_clock(config, dataset(task=config.task)))


def options(name, skip=()):
    found = load(name).to_dict()
    nested = {key: sorted(value) if isinstance(value, dict) else None for key, value in found.items()}
    return {key: value for key, value in nested.items() if key not in skip}


def test_all_have_the_same_options():
    """Of `data` and `model`, where the sources differ, those of the folders."""
    assert options("finetune") == options("nano")
    for name in ("digits", "textures"):
        assert options(name, ("data", "model")) == options("nano", ("data", "model"))
    of_classification = {"label_smoothing", "erase_probability", "mix"}
    assert all(load(name).label_smoothing == 0.1 for name in ALL if load(name).task == "classification")
    for name in [*SEGMENTATION, *DETECTION, *SHAPES]:
        skip = ("data", "model", "regions", *of_classification)
        assert options(name, skip) == options("nano", skip)
        assert not of_classification & options(name).keys()


@pytest.mark.parametrize("name", SEGMENTATION)
def test_ade20k_recipe(name):
    """Warm-up for 1,500 steps from a millionth of the rate, then a line to 0 with the last of 160,000 steps."""
    config = load(name)
    clock = make_clock(config, dataset(20_210, "segmentation"))
    assert (config.batch_size, clock.steps) == (16, 160_000)
    rate = schedule_of(config, clock)
    np.testing.assert_allclose([rate(0), rate(1499), rate(1500)], [6e-11, 6e-5, 6e-5], rtol=1e-6)
    np.testing.assert_allclose(rate(1500 + 158_499 // 2), 3e-5, rtol=1e-4)
    assert rate(159_999) == 0
    assert clock.steps_of("evaluate_every", config.evaluate_every) == 16_000
    recorded = backbone_config(config.model.name, drop_path=config.model.drop_path)
    assert recorded.drop_path == {"ade20k_tiny": 0.2}.get(name, 0.3)
    with pytest.raises(InputError, match=r"--config\.data\.root"):
        load_dataset(config.data)


@pytest.mark.parametrize("name", DETECTION)
def test_coco_recipe(name):
    """The rate warms up from a thousandth over 1,000 steps and falls to a tenth at two epochs."""
    config = load(name)
    clock = make_clock(config, dataset(117_266, "detection"))
    epochs, first, second = (36, 27, 33) if name.endswith("3x") else (12, 8, 11)
    assert (config.batch_size, clock.steps) == (16, epochs * 7329)
    rate = schedule_of(config, clock)
    np.testing.assert_allclose([rate(0), rate(999), rate(1000)], [1e-7, 1e-4, 1e-4], rtol=1e-5)
    for epoch, before, after in ((first, 1e-4, 1e-5), (second, 1e-5, 1e-6)):
        np.testing.assert_allclose([rate(epoch * 7329 - 1), rate(epoch * 7329)], [before, after], rtol=1e-5)
    assert (config.data.scale, config.data.multi_scale) == ((1333, 800), name.endswith("3x"))
    assert (config.optimizer.weight_decay, config.optimizer.no_decay, config.optimizer.clip_norm) == (0.05, "norms", 0)
    assert config.model.drop_path == 0.2
    with pytest.raises(InputError, match=r"--config\.data\.root"):
        load_dataset(config.data)


def test_a_task_needs_data_of_its_kind():
    with pytest.raises(InputError, match="are not for the task 'segmentation'"):
        make_task(load("ade20k_nano"), dataset())


def test_fine_tuning_needs_a_checkpoint():
    config = load("finetune")
    with pytest.raises(InputError, match=r"--config\.pretrained"):
        find_pretrained(config, make_task(config, dataset()).description, {})


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe(name, parity):
    config = load(name)
    task = make_task(config, dataset())
    assert (task.erase_probability, task.mixing) == (0.25, Mixing(mixup=0.8, cutmix=1.0))
    recipe_name = name if name.startswith("vssm") else f"msvmamba_{name}"
    assert config.model.name == recipe_name
    assert config.model.drop_path == VARIANTS[recipe_name].backbone.drop_path
    recorded = parity.json("recipe/lr_schedule.json")
    clock = make_clock(config, dataset())
    assert (config.batch_size, clock.steps) == (recorded["total_batch"], 300 * recorded["steps_per_epoch"])
    schedule = schedule_of(config, clock)
    for step, rate in recorded["values"].items():
        np.testing.assert_allclose(schedule(int(step)), rate, rtol=1e-6, err_msg=step)


@pytest.mark.parametrize("name", IMAGENET)
def test_data_options_are_the_recipes(name):
    config = load(name)
    with pytest.raises(InputError, match=r"--config\.data\.root"):  # the root is the user's to give
        load_dataset(config.data)
    augment = Augmentation()
    assert {key: config.data[key] for key in ("size", "interpolation", "randaugment", "scale", "ratio", "flip")} == {
        key: getattr(augment, key) for key in ("size", "interpolation", "randaugment", "scale", "ratio", "flip")
    }


def test_options_of_regions_are_checked():
    config, data = load("coco_tiny_1x"), dataset(task="detection")
    with config.ignore_type():
        config.regions.proposals = 1000
    with pytest.raises(InputError, match=r"config\.regions\.proposals must be two numbers"):
        make_task(config, data)
    del config.regions.anchor_samples
    with pytest.raises(InputError, match=r"config\.regions lacks anchor_samples"):
        make_task(config, data)


def test_options_of_mixing_are_checked():
    config = load("nano")
    config.mix.mixup = -1.0
    with pytest.raises(InputError, match=r"config\.mix\.mixup"):
        make_task(config, dataset())
    config = load("nano")
    config.mix = {"mixup": 0.8, "cutmixx": 1.0}
    with pytest.raises(InputError, match="cutmixx"):
        make_task(config, dataset())


@pytest.mark.parametrize(
    ("name", "source"),
    [("tiny", "tfds"), ("finetune", "tfds"), ("ade20k_tiny", "segmentation_tfds"), ("coco_tiny_1x", "coco_tfds")],
)
def test_prepared_data_need_no_other_keys(name, source, tmp_path):
    """What stops them here is that nothing is prepared, or that TensorFlow Datasets is not installed."""
    config = load(name)
    config.data.update(
        {"source": source, "name": "imagenet2012" if source == "tfds" else "", "data_dir": str(tmp_path)}
    )
    with pytest.raises(InputError, match=r"not prepared|TensorFlow Datasets|run 'python|prepare"):
        load_dataset(config.data)


def test_a_checkpoint_of_other_classes_is_not_evaluated():
    config = load("nano")
    theirs = make_task(config, dataset()).description
    swapped = dataclasses.replace(theirs, class_names=("class 1", "class 0", *theirs.class_names[2:]))
    with pytest.raises(InputError, match="label 0 is 'class 1' there and 'class 0' here"):
        task_of_checkpoint(config, swapped, dataset())
    assert task_of_checkpoint(config, theirs, dataset()).description == theirs


def test_a_missing_key_is_named(capsys):
    config = load("nano")
    del config["batch_size"]
    assert command.run(lambda: config.batch_size) == 1
    assert capsys.readouterr().err.startswith("error: the configuration has no key 'batch_size'")
