"""The commands as a person meets them: what they print and write, and one sentence for everything that is wrong."""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_runs import Outcome, call_in_process, run_command, run_process
from flax import nnx
from PIL import Image

from msvmamba_jax import command, predict, summary
from msvmamba_jax.checkpoint import Description, load_checkpoint, load_model, save_checkpoint
from msvmamba_jax.convert import __main__ as convert
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.models.parameters import abstract_model, flatten, get_parameters, unflatten
from msvmamba_jax.models.variants import VARIANTS, create_model

ROOT = Path(__file__).parents[2]
MODEL = {"name": "msvmamba_nano", "num_classes": 10, "width": 16, "depths": (1, 1, 1, 1)}
CLASS_NAMES = tuple(f"digit {index}" for index in range(10))
PREPROCESSING = Preprocessing(size=32, resize=40)


def load_torch_writer() -> types.ModuleType:
    name = "torch_writer"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "convert" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


torch_writer = load_torch_writer()


@pytest.fixture
def run() -> Callable[..., Outcome]:
    """Runs a command in this process, on the module that it is given."""

    def call(module: types.ModuleType, *arguments: Any) -> Outcome:
        return call_in_process(lambda: sys.exit(command.run(module._main)), module.__name__, *arguments)

    return call


@functools.cache
def parameters() -> dict[str, Any]:
    return random_parameters(**MODEL)


def random_parameters(**model: Any) -> dict[str, Any]:
    """Not as `create_model` draws them, which takes longer than all else here."""
    rng = np.random.default_rng(0)
    shapes = flatten(get_parameters(abstract_model(lambda: create_model(**model, rngs=nnx.Rngs(0)))))
    return unflatten({name: rng.normal(0, 0.25, leaf.shape).astype(np.float32) for name, leaf in shapes})


def description(**changes: Any) -> Description:
    return Description(
        **{"model": MODEL, "class_names": CLASS_NAMES, "preprocessing": PREPROCESSING, "source": {}, **changes}
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small checkpoint; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    save_checkpoint(folder, description(), parameters())
    return folder


# All commands


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("convert", ["file", "output", "--weights", "--overwrite"]),
        ("predict", ["checkpoint", "images", "--output", "--top", "--weights", "--dtype", "--batch-size"]),
        ("summary", ["--size", "--json"]),
        ("evaluate", ["--config", "--checkpoint", "--weights", "--throughput", "--json"]),
        ("train", ["--config", "--workdir"]),
    ],
)
def test_help(module, options):
    outcome = run_command(module, "--help")
    assert outcome.status == 0
    assert outcome.err == ""
    assert {option for option in options if option.strip("-") not in outcome.out} == set()


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 // 0)


def test_ctrl_c(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert command.run(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "the disk is full while writing /data/x"),
        (errno.EDQUOT, "the disk is full while writing /data/x"),
        (errno.EROFS, "no access to /data/x: Read-only file system"),
        (errno.EACCES, "no access to /data/x: Permission denied"),
    ],
)
def test_storage_problems_deep_inside(capsys, number, part):
    def fail():
        try:
            raise OSError(number, os.strerror(number), "/data/x")
        except OSError as error:
            raise RuntimeError("a library's own words") from error

    assert command.run(fail) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {part}")
    assert err.count("\n") == 1


# convert


def released_file(path: Path) -> Path:
    state = to_original(dict(flatten(parameters())), "multi_scale")
    torch_writer.write(path, {"model": state, "epoch": 299})
    return path


def test_convert(tmp_path):
    """The whole command in a process of its own."""
    outcome = run_process("convert", released_file(tmp_path / "net.pth"), tmp_path / "out")
    assert (outcome.status, outcome.err) == (0, "")
    count = sum(leaf.size for _, leaf in flatten(parameters()))
    [line] = outcome.out.splitlines()
    assert line.startswith(f"{tmp_path / 'out'}: msvmamba_nano (num_classes 10, width 16, ")
    assert line.endswith(f"raw weights, {count:,} parameters, from net.pth")
    _, stored = load_checkpoint(tmp_path / "out")
    found = dict(flatten(stored))
    for name, leaf in flatten(parameters()):
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_convert_safetensors_and_overwrite(run, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save(to_original(dict(flatten(parameters())), "multi_scale")))
    assert run(convert, path, tmp_path / "out").status == 0
    assert "pass --overwrite" in run(convert, path, tmp_path / "out").message
    assert run(convert, path, tmp_path / "out", "--overwrite").status == 0
    assert "pass --weights raw" in run(convert, path, tmp_path / "new", "--weights=ema").message


def truncated(path: Path) -> None:
    path.write_bytes(released_file(path).read_bytes()[:-2000])


def hostile(path: Path) -> None:
    call = torch_writer.Instance(torch_writer.Global("os", "system"), (f"touch {path.parent / 'marker'}",))
    torch_writer.write(path, {"model": call})


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "does not exist"),
        (Path.mkdir, "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("hello\n"), "is a text file"),
        (lambda path: path.write_text("<!DOCTYPE html>\n"), "is a web page"),
        (truncated, "is truncated or damaged"),
        (hostile, "holds no named tensors"),
        (lambda path: torch_writer.write(path, {"fc.weight": np.ones(3, np.float32)}), "no MSVMamba or VMamba model"),
    ],
    ids=["missing", "folder", "empty", "text", "web page", "truncated", "hostile", "another model"],
)
def test_convert_bad_files(run, tmp_path, make, part):
    path = tmp_path / "net.pth"
    make(path)
    before = sorted(tmp_path.iterdir())
    message = run(convert, path, tmp_path / "out").message
    assert str(path) in message
    assert part in message
    assert sorted(tmp_path.iterdir()) == before  # no output, and no marker


def test_convert_to_a_full_disk(run, tmp_path, monkeypatch):
    path = released_file(tmp_path / "net.pth")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(os, "mkdir", full)
    assert "No space left on device" in run(convert, path, tmp_path / "out").message
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_without_memory(run):
    def main():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 43.76GiB with allocator GPU_0_bfc on device 0."
        )

    outcome = run(types.SimpleNamespace(__name__="train", _main=main))
    assert outcome.status == 1
    assert outcome.err.startswith(
        "error: the device ran out of memory (asked for 43.76GiB at once): use a smaller batch"
    )
    assert outcome.err.count("\n") == 1


# predict


def gradient(height: int, width: int) -> np.ndarray:
    """A colour image without symmetry."""
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    return np.stack([255 * x, 255 * y, 255 * x * y], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with files of many kinds; `rotated` shows what `plain` shows, turned by its EXIF orientation."""
    folder = tmp_path_factory.mktemp("photos")
    image = Image.fromarray(gradient(45, 61))
    image.save(folder / "plain.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)  # upright again after a clockwise quarter: orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "rotated.png", exif=exif)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.fromarray(gradient(45, 61)[..., 0]))
    rgba.save(folder / "alpha.png")
    Image.fromarray(gradient(1, 1)).save(folder / "dot.png")
    Image.fromarray(gradient(33, 200)).save(folder / "wide.jpeg", quality=95)
    return folder


@pytest.fixture(scope="module")
def logits_of(checkpoint) -> Callable[[np.ndarray], np.ndarray]:
    """The model itself on normalised images, compiled once for all of them."""
    model, rows = load_model(checkpoint), 40
    call = jax.jit(model.__call__)

    def logits(images: np.ndarray) -> np.ndarray:
        padded = np.pad(images, [(0, -len(images) % rows), (0, 0), (0, 0), (0, 0)])
        return np.concatenate([call(part) for part in padded.reshape(-1, rows, *images.shape[1:])])[: len(images)]

    return logits


@pytest.fixture(scope="module")
def reference(logits_of):
    """Probabilities of one image of any size."""

    def probabilities(image: np.ndarray) -> np.ndarray:
        [logits] = logits_of(PREPROCESSING.normalise(PREPROCESSING.crop(image))[None])
        return np.exp(logits) / np.exp(logits).sum()

    return probabilities


@pytest.fixture(scope="module")
def predicted(checkpoint, photos, tmp_path_factory):
    """The command once, in a process of its own: outcome and output folder."""
    output = tmp_path_factory.mktemp("predicted") / "deep" / "out"
    return run_process("predict", checkpoint, photos, "--output", output, "--top=3", "--batch-size=4"), output


def test_predict_prints_a_line_for_each_image(predicted, photos):
    outcome, output = predicted
    assert (outcome.status, outcome.err) == (0, "")
    *lines, last = outcome.out.splitlines()
    files = sorted(photos.iterdir())
    assert [line.partition(": ")[0] for line in lines] == list(map(str, files))
    for line in lines:
        entries = line.partition(": ")[2].split(", ")
        assert len(entries) == 3
        assert all(entry.startswith("digit ") and entry.endswith("%") for entry in entries)
    assert last == f"wrote {output / 'predictions.json'} and {output / 'predictions.png'}"


def test_predictions_are_those_of_the_model(predicted, photos, reference):
    predictions = json.loads((predicted[1] / "predictions.json").read_text())
    assert [entry["file"] for entry in predictions] == [str(path) for path in sorted(photos.iterdir())]
    for entry in predictions:
        assert entry.keys() == {"file", "classes"}
        name = Path(entry["file"]).name
        with Image.open(entry["file"]) as image:
            if name in ("plain.png", "grey.jpg", "dot.png", "wide.jpeg"):
                expected = reference(np.asarray(image.convert("RGB")))
            elif name == "rotated.png":
                expected = reference(gradient(45, 61))
            else:
                continue
        order = np.argsort(-expected)[:3]
        assert [found["label"] for found in entry["classes"]] == order.tolist()
        assert [found["name"] for found in entry["classes"]] == [CLASS_NAMES[label] for label in order]
        found = [found["probability"] for found in entry["classes"]]
        np.testing.assert_allclose(found, expected[order], rtol=1e-3)


def test_the_picture(predicted, photos):
    count = len(list(photos.iterdir()))
    assert count == 7
    with Image.open(predicted[1] / "predictions.png") as picture:
        picture.load()
    # four columns and two rows of tiles of 224 pixels, with a line above and three below
    assert picture.size == (4 * (224 + 16) + 16, 2 * (20 + 224 + 8 + 3 * 20 + 16) + 16)
    assert len(picture.convert("RGB").getcolors(10**6)) > 100


@pytest.mark.parametrize(("images", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 3, 2), (60, 8, 8)])
def test_the_size_of_the_picture(images, columns, rows):
    from msvmamba_jax.pictures import prediction_sheet

    entry = {"file": "x" * 99, "classes": [{"name": "y" * 99, "probability": 1.0}]}
    sheet = prediction_sheet([gradient(32, 32)] * images, [entry] * images)
    assert sheet.size == (columns * 240 + 16, rows * 328 + 16)


@pytest.fixture
def no_model(monkeypatch):
    """`predict` without compiling: each image's most probable class is its mean brightness."""

    class Function:
        class_names = CLASS_NAMES
        preprocessing = PREPROCESSING

        def __init__(self, *_: Any, **__: Any):
            self.batches: list[int] = []
            Function.last = self

        def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
            self.batches.append(len(images))
            labels = (images.mean((1, 2, 3)) / 25.6).astype(int)
            return {"probabilities": np.eye(10, dtype=np.float32)[labels]}

    monkeypatch.setattr("msvmamba_jax.inference.inference_function", Function)
    return Function


def test_predict_bad_files_among_good_ones(run, no_model, checkpoint, tmp_path):
    for index in range(4):
        Image.new("RGB", (40, 40), (60 * index,) * 3).save(tmp_path / f"{index}.png")
    (tmp_path / "0_text.jpg").write_text("no image\n")
    broken = (tmp_path / "3.png").read_bytes()[:60]
    (tmp_path / "9.png").write_bytes(broken)
    outcome = run(predict, checkpoint, tmp_path, "--output", tmp_path / "out", "--batch-size=2", "--top=1")
    assert outcome.status == 1
    errors = outcome.err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)
    assert errors[0].count("0_text.jpg") == 1
    assert "9.png" in errors[1]
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in predictions] == [f"{index}.png" for index in range(4)]
    assert [entry["classes"][0]["label"] for entry in predictions] == [0, 2, 4, 7]
    assert len(outcome.out.splitlines()) == 5
    assert set(no_model.last.batches) == {2}  # one shape, one compilation


def test_predict_keeps_what_was_done_before_an_interruption(run, no_model, checkpoint, photos, tmp_path, monkeypatch):
    call, calls = no_model.__call__, []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, images)

    monkeypatch.setattr(no_model, "__call__", interrupted)
    outcome = run(predict, checkpoint, photos, "--output", tmp_path / "out", "--batch-size=2")
    assert (outcome.status, outcome.err) == (130, "interrupted\n")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 4


def test_predict_beside_its_images(run, no_model, checkpoint, photos):
    """Labels of another tool may have the names that pictures would get."""
    before = sorted(photos.iterdir())
    assert "holds images that are to be read" in run(predict, checkpoint, photos, "--output", photos).message
    assert sorted(photos.iterdir()) == before


def test_predict_without_numbers(run, no_model, checkpoint, photos, monkeypatch):
    def overflow(self, images):
        return {"probabilities": np.full((len(images), 10), np.nan, np.float32)}

    monkeypatch.setattr(no_model, "__call__", overflow)
    assert "are not finite: try --dtype float32" in run(predict, checkpoint, photos).message


def test_predict_only_bad_files(run, no_model, checkpoint, tmp_path):
    (tmp_path / "text.jpg").write_text("no image\n")
    assert "text.jpg" in run(predict, checkpoint, tmp_path / "text.jpg", "--output", tmp_path / "out").message
    assert not (tmp_path / "out").exists()


def test_predict_more_classes_than_there_are(run, no_model, checkpoint, photos):
    outcome = run(predict, checkpoint, photos / "dot.png", "--top=99")
    assert outcome.status == 0
    assert outcome.out.count("%") == 10


@pytest.mark.parametrize("option", ["--top=0", "--batch-size=-1"])
def test_predict_bad_numbers(run, checkpoint, photos, option):
    assert f"{option.partition('=')[0]} must be at least 1" in run(predict, checkpoint, photos, option).message


def test_predict_missing_paths(run, checkpoint, photos, tmp_path):
    assert str(tmp_path / "none.jpg") in run(predict, checkpoint, photos, tmp_path / "none.jpg").message
    (tmp_path / "empty").mkdir()
    assert "holds no image" in run(predict, checkpoint, tmp_path / "empty").message


def test_predict_missing_checkpoints(run, photos, tmp_path):
    assert "no such folder" in run(predict, tmp_path / "none", photos).message
    assert "there is no checkpoint in" in run(predict, tmp_path, photos).message
    path = released_file(tmp_path / "net.pth")
    hint = f"convert it first: python -m msvmamba_jax.convert {path} OUTPUT"
    assert run(predict, path, photos).message.endswith(hint)


def test_predict_output_that_cannot_be(run, no_model, checkpoint, photos, tmp_path):
    (tmp_path / "taken").write_text("mine")
    message = run(predict, checkpoint, photos, "--output", tmp_path / "taken").message
    assert f"{tmp_path / 'taken'} is a file" in message
    outcome = run(predict, checkpoint, photos, "--output", tmp_path / "taken" / "out")
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: cannot write {tmp_path / 'taken' / 'out'}")
    assert outcome.err.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("place", ["mkdir", "open"])
def test_predict_to_a_full_disk(run, no_model, checkpoint, photos, tmp_path, monkeypatch, place):
    output = tmp_path / "out"

    def full(original):
        def call(file, *arguments, **options):
            if isinstance(file, str | Path) and str(output) in str(file):
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
            return original(file, *arguments, **options)

        return call

    if place == "mkdir":
        monkeypatch.setattr(os, "mkdir", full(os.mkdir))
    else:
        monkeypatch.setattr("builtins.open", full(open))
        monkeypatch.setattr(io, "open", full(io.open))
    outcome = run(predict, checkpoint, photos, "--output", output)
    assert outcome.status == 1
    assert outcome.err.startswith("error: cannot write ")
    assert "No space left on device" in outcome.err
    assert outcome.err.count("\n") == 1


# Damaged and hostile checkpoints


def edit(**changes: Any) -> Callable[[Path], None]:
    """Changes values of a checkpoint's description; None removes one."""

    def apply(folder: Path) -> None:
        path = folder / "model" / "metadata"
        values = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                del values[key]
            else:
                values[key] = values[key] | value if isinstance(value, dict) and key == "model" else value
        path.write_text(json.dumps(values))

    return apply


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def data_files(folder: Path) -> list[Path]:
    """The array files, largest first."""
    files = [path for path in (folder / "state").rglob("*") if path.is_file() and "/d/" in str(path)]
    assert files
    return sorted(files, key=lambda path: -path.stat().st_size)


def shorten(folder: Path) -> None:
    for path in data_files(folder):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_arrays(folder: Path) -> None:
    for path in data_files(folder):
        path.unlink()


DAMAGES = {
    "no JSON": (write("model/metadata", b"{garbage"), "damaged or incomplete"),
    "binary": (write("model/metadata", b"\xff\xfe\x00\x01"), "damaged or incomplete"),
    "a list": (write("model/metadata", b"[]"), "description is damaged"),
    "null": (write("model/metadata", b"null"), "description is damaged"),
    "no description": (lambda folder: (folder / "model" / "metadata").unlink(), "damaged or incomplete"),
    "no model": (edit(model=None), "description is damaged"),
    "no names": (edit(class_names=None), "description is damaged"),
    "newer format": (edit(format=2), "written by a newer version of msvmamba_jax: upgrade to read it"),
    "format of text": (edit(format="new"), "description is damaged"),
    "another task": (edit(task="pose"), "for the task 'pose', which this version does not know"),
    "count of names": (edit(class_names=["a", "b"]), "10 classes have 2 names"),
    "count of classes": (edit(model={"num_classes": 7}), "7 classes have 10 names"),
    "unknown option": (edit(model={"scan_implementation": "x"}), "unknown options: scan_implementation"),
    "unknown model": (edit(model={"name": "resnet"}), "there is no model 'resnet'"),
    "name of numbers": (edit(model={"name": [1]}), "there is no model"),
    "width of text": (edit(model={"width": "wide"}), "description is damaged"),
    "impossible width": (edit(model={"width": -16}), "width must be"),
    "impossible depths": (edit(model={"depths": [1, 1]}), "depths must be"),
    "another width": (edit(model={"width": 24}), "do not fit the model: "),
    "deeper": (edit(model={"depths": [1, 1, 2, 1]}), "is missing"),
    "unknown preprocessing": (edit(preprocessing={"zoom": 2}), "unknown key zoom"),
    "impossible preprocessing": (edit(preprocessing={"size": -1}), "size must be"),
    "no arrays": (delete_arrays, "damaged or incomplete"),
    "short arrays": (shorten, "damaged or incomplete"),
    "no metadata of arrays": (lambda folder: (folder / "state" / "_METADATA").unlink(), "damaged or incomplete"),
    "garbled metadata of arrays": (write("state/_METADATA", b"{}"), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(run, checkpoint, photos, tmp_path, damage):
    apply, part = DAMAGES[damage]
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    apply(folder)
    message = run(predict, folder, photos / "plain.png").message
    assert part in message
    assert len(message) < 2000


def test_a_damaged_checkpoint_in_a_process(checkpoint, photos, tmp_path):
    """No library writes to standard error beside us."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    shorten(tmp_path / "copy")
    assert "damaged or incomplete" in run_process("predict", tmp_path / "copy", photos).message


def test_weights_that_are_not_there(run, checkpoint, photos):
    assert "holds no averaged weights" in run(predict, checkpoint, photos, "--weights=ema").message


# evaluate

CONFIG = ROOT / "configs" / "digits.py"


@pytest.fixture(scope="module")
def digits_checkpoint(tmp_path_factory) -> Path:
    from msvmamba_jax.data import digits

    folder = tmp_path_factory.mktemp("digits") / "small"
    save_checkpoint(
        folder, description(class_names=digits.CLASS_NAMES, preprocessing=digits.PREPROCESSING), parameters()
    )
    return folder


@pytest.fixture(scope="module")
def evaluated(digits_checkpoint, tmp_path_factory):
    """The command once, with every option: outcome and the JSON file's content."""
    report = tmp_path_factory.mktemp("evaluated") / "report.json"
    outcome = run_command(
        "evaluate",
        f"--config={CONFIG}",
        f"--checkpoint={digits_checkpoint}",
        "--config.batch_size=64",
        "--throughput",
        "--weights=raw",
        f"--json={report}",
    )
    assert (outcome.status, outcome.err) == (0, "")
    return outcome, json.loads(report.read_text())


def test_evaluate_counts_exactly(evaluated, logits_of):
    from msvmamba_jax.data import digits

    _, dataset = digits.load_digits()
    images = np.stack([dataset[index]["image"] for index in range(len(dataset))])
    labels = np.array([dataset[index]["label"] for index in range(len(dataset))])
    logits = logits_of(digits.PREPROCESSING.normalise(images))  # the same weights as in the small checkpoint
    own = logits[np.arange(len(labels)), labels]
    rank = (logits > own[:, None]).sum(axis=1)
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    _, report = evaluated
    assert report["raw"]["images"] == len(labels) == 360  # the last of six batches has 40
    assert round(report["raw"]["accuracy_top1"] * 360) == (rank < 1).sum()
    assert round(report["raw"]["accuracy_top5"] * 360) == (rank < 5).sum()
    assert report["raw"]["accuracy_top1"] * 360 % 1 == pytest.approx(0)
    assert report["raw"]["loss"] == pytest.approx(np.mean(log_sum - own), rel=1e-5)
    assert 0 < (rank < 1).sum() < (rank < 5).sum() < 360


def test_evaluate_reports(evaluated, digits_checkpoint):
    outcome, report = evaluated
    assert report.keys() == {"checkpoint", "model", "parameters", "multiply_adds", "raw", "throughput"}
    assert report["checkpoint"] == str(digits_checkpoint)
    assert report["model"] == "msvmamba_nano"
    assert report["parameters"] == sum(leaf.size for _, leaf in flatten(parameters()))
    speed = report["throughput"]
    assert speed["batch_size"] == 64
    assert speed["devices"] == jax.device_count()
    assert speed["images_per_second"] * speed["milliseconds_per_batch"] == pytest.approx(64_000)
    first, second, third = outcome.out.splitlines()
    assert first.startswith(f"{digits_checkpoint}: msvmamba_nano, {report['parameters']:,} parameters, ")
    assert first.endswith(f"{report['multiply_adds']:,} multiply-adds at 32 x 32")
    assert second.startswith(f"raw weights: top-1 {report['raw']['accuracy_top1']:.2%}, top-5 ")
    assert second.endswith("on 360 images")
    assert third.startswith("throughput: ")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config={config}", "--config.bach_size=3"], "no key 'bach_size'. Did you mean \"batch_size\""),
        (["--config={config}", "--config.data.rot=3"], "no key 'rot'"),
        (["--config={config}", "--config.batch_size=many"], "config.batch_size=many: invalid literal for int()"),
        (["--config={config}", "--wieghts=raw"], "Unknown command line flag 'wieghts'"),
        (["--config={config}", "--weights=best"], "weights=best"),
        (["--config={config}", "stray"], "unexpected argument 'stray'"),
        (["--config={config}.missing"], "No such file or directory"),
        (["--config={config}.missing", "--config.batch_size=3"], "No such file or directory"),
        (["--config={folder}"], "Is a directory"),
        ([], "Flag --config must have a value"),
        (["--config={config}", "--checkpoint={folder}/none"], "no such folder"),
        (["--config={config}", "--json={folder}"], "it is a folder"),
        (["--config={config}", "--json={folder}/none/scores.json"], "there is no folder"),
        (["--config={config}", "--config.data.source=imagenet1"], "data source 'imagenet1'"),
        (["--config={config}", "--config.batch_size=0"], "batch_size 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_bad_arguments(digits_checkpoint, tmp_path, arguments, part):
    given = [argument.format(config=CONFIG, folder=tmp_path) for argument in arguments]
    assert part in run_command("evaluate", f"--checkpoint={digits_checkpoint}", *given).message


def test_evaluate_bad_arguments_in_a_process(digits_checkpoint):
    outcome = run_process("evaluate", f"--checkpoint={digits_checkpoint}", f"--config={CONFIG}", "--wieghts=raw")
    assert "Unknown command line flag 'wieghts'" in outcome.message


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def get_config(:", "the configuration is no working Python"),
        ("import no_such_package", "the configuration is no working Python"),
        ("raise_this_name", "the configuration is no working Python"),
        ("def recipe(): pass", "the configuration has no get_config()"),
    ],
)
def test_configuration_that_does_not_work(tmp_path, code, problem):
    (tmp_path / "broken.py").write_text(code)
    message = run_command("train", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}").message
    assert problem in message
    assert not (tmp_path / "run").exists()


def test_evaluate_bad_weights(digits_checkpoint):
    outcome = run_command("evaluate", f"--config={CONFIG}", f"--checkpoint={digits_checkpoint}", "--weights=ema")
    assert "holds no averaged weights" in outcome.message


def test_evaluate_with_other_classes(tmp_path):
    model = {**MODEL, "num_classes": 7}
    save_checkpoint(
        tmp_path / "seven", description(model=model, class_names=CLASS_NAMES[:7]), random_parameters(**model)
    )
    message = run_command("evaluate", f"--config={CONFIG}", f"--checkpoint={tmp_path / 'seven'}").message
    assert "knows 7 classes, but the data of this configuration has 10" in message


# summary


@pytest.fixture(scope="module")
def summarised(tmp_path_factory):
    """The command once, for an image that is not square: outcome and the JSON file's content."""
    path = tmp_path_factory.mktemp("summary") / "table.json"
    outcome = run_command("summary", "--size=224x224", "--json", path)
    assert (outcome.status, outcome.err) == (0, "")
    return outcome, json.loads(path.read_text())


def test_summary(summarised, parity):
    outcome, table = summarised
    assert (table["height"], table["width"]) == (224, 224)
    rows = {row["model"]: row for row in table["models"]}
    assert list(rows) == list(VARIANTS)
    for recorded in ("nano", "micro", "tiny", "vssm_tiny"):
        name = recorded if recorded.startswith("vssm") else f"msvmamba_{recorded}"
        assert rows[name]["parameters"] == parity.json(f"classification/{recorded}.json")["params"]
    assert rows["msvmamba_tiny"]["features"] == [[56, 56, 96], [28, 28, 192], [14, 14, 384], [7, 7, 768]]
    assert rows["msvmamba_tiny"]["reported_top1"] == 82.8
    lines = outcome.out.splitlines()
    assert len(lines) == len(VARIANTS) + 2
    for line, row in zip(lines[1:], rows.values(), strict=False):
        assert line.split()[0] == row["model"]
        assert f"{row['parameters']:,}" in line
        assert f"{row['multiply_adds']:,}" in line


@pytest.mark.parametrize("size", ["big", "", "224x", "1x2x3", "3", "224x2", "-5", "1.5"])
def test_summary_bad_sizes(run, size):
    assert repr(size) in run(summary, f"--size={size}").message


@pytest.fixture
def few_variants(monkeypatch):
    """Building all models takes long."""
    monkeypatch.setattr("msvmamba_jax.models.variants.VARIANTS", {"msvmamba_nano": VARIANTS["msvmamba_nano"]})


def test_summary_of_other_sizes(run, few_variants):
    assert "16x24x48  8x12x96  4x6x192  2x3x384" in run(summary, "--size=64x97").out
    assert "16x16x48" in run(summary, "--size", "64").out


@pytest.mark.parametrize(
    ("name", "part"), [("none/table.json", "No such file"), ("", "Is a directory"), ("/dev/full", "No space left")]
)
def test_summary_json_that_cannot_be_written(run, few_variants, tmp_path, name, part):
    if name == "/dev/full" and not Path(name).exists():
        pytest.skip("no /dev/full here")
    outcome = run(summary, "--size=32", "--json", tmp_path / name)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: cannot write {tmp_path / name}: {part}")
    assert outcome.err.count("\n") == 1


PRINTER = "import sys; from msvmamba_jax import command; sys.exit(command.run(lambda: print('x' * int(sys.argv[1]))))"


@pytest.mark.parametrize("length", [10, 10**6])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_cannot_be_written(length, unbuffered):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    start = functools.partial(
        subprocess.Popen,
        [sys.executable, "-c", PRINTER, str(length)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            process = start(stdout=full)
            _, err = process.communicate(timeout=600)
        assert process.returncode == 1
        assert err == "error: the disk is full: free some space and run the same command again\n"
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has enough
    process = start(stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (1, "")


def test_modules_can_be_run_without_arguments(monkeypatch, capsys):
    """`python -m` without its arguments says what is missing."""
    monkeypatch.setattr(sys, "argv", ["predict"])
    monkeypatch.delitem(sys.modules, "msvmamba_jax.predict")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("msvmamba_jax.predict", run_name="__main__")
    assert caught.value.code == 2
    assert "the following arguments are required: checkpoint, images" in capsys.readouterr().err
