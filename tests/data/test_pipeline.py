"""Batches depend on seed, step and process count alone, cover every epoch, and count every evaluation image once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import ml_collections
import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data import datasets, pipeline
from msvmamba_jax.data.images import read_image
from msvmamba_jax.data.pipeline import Batch, Dataset
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Images that show their own number, which is their label too."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"image": np.full((5 + index % 3, 4, 3), index % 256, np.uint8), "label": index}


def add_noise(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**record, "image": rng.integers(0, 256, (4, 4, 3), np.uint8)}


def numbers(train: int = 64, evaluation: int = 10, augment: Any = None) -> Dataset:
    names = tuple(map(str, range(max(train, evaluation))))
    return make(Numbers(train), Numbers(evaluation), names, Preprocessing(size=4, resize=4), augment)


def make(
    train: Any, evaluation: Any, names: tuple[str, ...], preprocessing: Preprocessing, augment: Any = None
) -> Dataset:
    prepare = functools.partial(datasets.cropped, preprocessing)
    return Dataset(
        train=train,
        evaluation=evaluation,
        class_names=names,
        preprocessing=preprocessing,
        augment=augment or functools.partial(without_noise, prepare),
        prepare=prepare,
    )


def without_noise(prepare: Any, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return prepare(record)


def take(dataset: Dataset, count: int, **options: Any) -> list[Batch]:
    options = {"batch_size": 8, "seed": 0, "start_step": 0, **options}
    with contextlib.closing(pipeline.train_batches(dataset, **options)) as batches:
        return list(itertools.islice(batches, count))


def evaluation(dataset: Dataset, *, batch_size: int, **options: Any) -> list[Batch]:
    plan = pipeline.plan_evaluation(dataset, batch_size=batch_size)
    return list(pipeline.evaluation_batches(dataset, plan, **options))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def labels(batches: list[Batch]) -> list[int]:
    return np.concatenate([batch["label"] for batch in batches]).tolist()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return datasets.load_dataset({"source": "digits"})


def test_training_batch(digits: Dataset) -> None:
    (batch,) = take(digits, 1, batch_size=16)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((16, 32, 32, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((16,), np.int32)
    (batch,) = take(digits, 1, batch_size=1)
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(digits: Dataset, workers: int) -> None:
    # 1437 // 256 = 5 steps an epoch: the seven batches cross into the second.
    inline = take(digits, 7, batch_size=256, seed=5, start_step=1)
    assert_same(inline, take(digits, 7, batch_size=256, seed=5, start_step=1, workers=workers))


def test_memory_that_workers_use_again_holds_the_right_batch(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    regions = set()
    receive = pipeline.handover.Receiver.__call__

    def noted(self: Any, sent: Any) -> Batch:
        regions.add(sent.path)
        return receive(self, sent)

    monkeypatch.setattr(pipeline.handover.Receiver, "__call__", noted)
    options = {"batch_size": 16, "seed": 5, "start_step": 0}
    with (
        contextlib.closing(pipeline.train_batches(digits, **options)) as inline,
        contextlib.closing(pipeline.train_batches(digits, **options, workers=1)) as batches,
    ):
        for _ in range(40):
            assert_same([next(inline)], [next(batches)])  # and dropped
    assert len(regions) < 10


def test_workers_from_a_script(tmp_path: Path, digits: Dataset) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import itertools\n"
        "from msvmamba_jax.data import datasets, pipeline\n"
        "def main():\n"
        "    dataset = datasets.load_dataset({'source': 'digits'})\n"
        "    batches = pipeline.train_batches(dataset, batch_size=8, seed=3, start_step=0, workers=2)\n"
        "    for batch in itertools.islice(batches, 3):\n"
        "        print(batch['label'].tolist(), int(batch['image'].sum()))\n"
        "    batches.close()\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{batch['label'].tolist()} {int(batch['image'].sum())}" for batch in take(digits, 3, seed=3)]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("step", [1, 4, 7, 13])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(step: int) -> None:
    dataset = numbers(train=37, augment=add_noise)  # 4 steps an epoch
    whole = take(dataset, 16, seed=1)
    assert_same(whole[step:], take(dataset, 16 - step, seed=1, start_step=step))
    assert_same(whole[8:], take(dataset, 8, seed=1, start_step=8))


def grouped(augment: Any = None) -> Dataset:
    """37 records in three groups, of 19, 12 and 6, and a number of slots for each."""
    groups = np.array([0, 1, 0, 2, 0, 1] * 6 + [0])
    slots = np.array([8, 8, 8, 16, 8, 8, 8] * 5 + [32, 8])
    return dataclasses.replace(numbers(train=37, augment=augment), train_groups=groups, train_slots=slots)


def keep_slots(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**record, "image": rng.integers(0, 256, (4, 4, 3), np.uint8)}


@pytest.mark.parametrize("process_count", [1, 2])
def test_batches_of_groups(process_count: int) -> None:
    dataset = grouped(keep_slots)
    assert pipeline.train_steps_per_epoch(dataset, batch_size=4) == 4 + 3 + 1
    shards = [
        take(dataset, 24, batch_size=4, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    orders = []
    for epoch in range(3):
        seen = []
        for step in range(8 * epoch, 8 * epoch + 8):
            rows = np.concatenate([shard[step]["label"] for shard in shards])
            assert len(set(dataset.train_groups[rows])) == 1
            slots = {int(x) for shard in shards for x in shard[step]["slots"]}
            assert slots == {int(dataset.train_slots[rows].max())}
            seen += rows.tolist()
        assert len(set(seen)) == 32
        assert np.bincount(dataset.train_groups[seen]).tolist() == [16, 12, 4]
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_groups_are_the_same_after_a_restart(workers: int) -> None:
    whole = take(grouped(keep_slots), 20, batch_size=4)
    assert_same(whole[7:], take(grouped(keep_slots), 13, batch_size=4, start_step=7, workers=workers))


def test_groups_too_small_for_a_batch() -> None:
    assert pipeline.unused_records(grouped(), batch_size=6) == 0
    assert pipeline.unused_records(grouped(), batch_size=8) == 6
    assert pipeline.unused_records(numbers(train=5), batch_size=4) == 0
    with pytest.raises(InputError, match="at most 19 of one shape"):
        pipeline.train_steps_per_epoch(grouped(), batch_size=20)


def test_seed_decides_order_and_augmentation() -> None:
    dataset = numbers(augment=add_noise)
    first, again, other = (take(dataset, 4, seed=seed) for seed in (0, 0, 1))
    assert_same(first, again)
    assert labels(first) != labels(other)
    noise = [{image.tobytes() for batch in batches for image in batch["image"]} for batches in (first, other)]
    assert len(noise[0]) == len(noise[1]) == 32
    assert not noise[0] & noise[1]


def test_augmentation_differs_between_epochs_and_leaves_the_order() -> None:
    plain, noisy = (take(numbers(train=8, augment=augment), 6) for augment in (None, add_noise))
    assert labels(plain) == labels(noisy)
    assert len({image.tobytes() for batch in noisy for image in batch["image"]}) == 48


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_every_epoch_covers_the_records(process_count: int) -> None:
    dataset = numbers(train=64)
    shards = [take(dataset, 24, process_index=index, process_count=process_count) for index in range(process_count)]
    orders = []
    for epoch in range(3):
        seen = [label for shard in shards for label in labels(shard[8 * epoch : 8 * epoch + 8])]
        assert sorted(seen) == list(range(64))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_what_fills_no_batch_is_left_out_of_each_epoch() -> None:
    dataset = numbers(train=21)
    assert pipeline.train_steps_per_epoch(dataset, batch_size=8) == 2
    batches = take(dataset, 40)
    for epoch in range(20):
        seen = labels(batches[2 * epoch : 2 * epoch + 2])
        assert len(set(seen)) == 16
    assert set(labels(batches)) == set(range(21))  # another five each time


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_processes(process_count: int) -> None:
    dataset = numbers(train=37, augment=add_noise)
    shards = [take(dataset, 9, process_index=index, process_count=process_count) for index in range(process_count)]
    for step, whole in enumerate(take(dataset, 9)):
        for index, shard in enumerate(shards):
            for key in whole:
                np.testing.assert_array_equal(shard[step][key], whole[key][index::process_count])


def test_a_grain_transformation_augments_too() -> None:
    class AddNoise(grain.transforms.RandomMap):
        def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
            return add_noise(element, rng)

    assert_same(take(numbers(augment=AddNoise()), 3), take(numbers(augment=add_noise), 3))


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8, 9, 15, 16, 17])
def test_every_evaluation_image_counts_once(count: int, process_count: int) -> None:
    dataset = numbers(evaluation=count)
    steps = len(pipeline.plan_evaluation(dataset, batch_size=8).rows)
    assert steps == (count + 7) // 8
    seen: list[int] = []
    for index in range(process_count):
        batches = evaluation(dataset, batch_size=8, process_index=index, process_count=process_count)
        assert len(batches) == steps
        for batch in batches:
            assert (batch["image"].shape, batch["image"].dtype) == ((8 // process_count, 4, 4, 3), np.uint8)
            assert (batch["label"].dtype, batch["mask"].dtype) == (np.int32, np.bool_)
            seen += batch["label"][batch["mask"]].tolist()
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    assert sorted(seen) == list(range(count))


def test_evaluation_keeps_the_order(digits: Dataset) -> None:
    batches = evaluation(digits, batch_size=100)
    assert [batch["mask"].sum() for batch in batches] == [100, 100, 100, 60]
    assert labels(batches)[:360] == [digits.evaluation[index]["label"] for index in range(360)]
    np.testing.assert_array_equal(batches[3]["image"][59], digits.evaluation[359]["image"])


@pytest.mark.parametrize("process_count", [1, 2])
def test_batches_are_of_one_shape(process_count: int) -> None:
    """Five records of one shape, four of another, one of a third: 2 + 1 + 1 batches of four."""
    shapes = [(5 + index % 2, 4) if index else (9, 9) for index in range(10)]
    dataset = dataclasses.replace(numbers(), prepare=lambda record: record, evaluation_shapes=lambda: shapes)
    plan = pipeline.plan_evaluation(dataset, batch_size=4)
    assert plan.rows.tolist() == [[0, -1, -1, -1], [1, 3, 5, 7], [9, -1, -1, -1], [2, 4, 6, 8]]
    assert (plan.shapes, plan.images) == (3, 10)
    dataset = dataclasses.replace(dataset, prepare=functools.partial(of_shape, shapes))
    seen = []
    for index in range(process_count):
        batches = list(pipeline.evaluation_batches(dataset, plan, process_index=index, process_count=process_count))
        assert [batch["image"].shape[1:3] for batch in batches] == [(9, 9), (6, 4), (6, 4), (5, 4)]
        seen += np.concatenate([batch["label"][batch["mask"]] for batch in batches]).tolist()
    assert sorted(seen) == list(range(10))


def of_shape(shapes: list[tuple[int, int]], record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "image": np.zeros((*shapes[record["label"]], 3), np.uint8)}


@dataclasses.dataclass(frozen=True)
class Files:
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_image(self.paths[index]), "label": index}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    paths = tuple(tmp_path / f"{index}.png" for index in range(6))
    for index, path in enumerate(paths):
        Image.new("RGB", (20 + index, 30), (index, 0, 0)).save(path)
    return Files(paths)


def test_images_of_different_sizes(files: Files) -> None:
    dataset = make(files, files, tuple("012345"), Preprocessing(size=16, resize=18))
    (batch,) = take(dataset, 1, batch_size=6)
    assert batch["image"].shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(batch["image"][:, 3, 3, 0], batch["label"])
    (batch,) = evaluation(dataset, batch_size=6)
    np.testing.assert_array_equal(batch["image"][:, 3, 3, 0], np.arange(6))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_ends_with_its_name(files: Files, workers: int) -> None:
    files.paths[4].write_bytes(b"no image")
    dataset = make(files, files, tuple("012345"), Preprocessing(size=16, resize=18))
    with pytest.raises(InputError, match=r"4\.png"):
        take(dataset, 1, batch_size=6, workers=workers)
    with pytest.raises(InputError, match=r"4\.png"):
        evaluation(dataset, batch_size=6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_signals_to_all_processes_leave_the_workers_alone(digits: Dataset, number: int) -> None:
    """A run saves first."""
    with contextlib.closing(pipeline.train_batches(digits, batch_size=8, seed=0, start_step=0, workers=1)) as batches:
        next(batches)
        [worker] = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, number)
        for _ in range(6):  # more than were made before
            next(batches)
        assert worker.is_alive()


def test_a_killed_worker_ends_with_a_sentence(digits: Dataset) -> None:
    with contextlib.closing(pipeline.train_batches(digits, batch_size=8, seed=0, start_step=0, workers=1)) as batches:
        next(batches)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(InputError, match="was killed, perhaps because memory ran out"):
            list(itertools.islice(batches, 20))


def test_closing_stops_the_workers(digits: Dataset) -> None:
    batches = pipeline.train_batches(digits, batch_size=8, seed=0, start_step=0, workers=1)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 65}, "64 images"),
        ({"batch_size": 6, "process_count": 4}, "process"),
        ({"process_index": 2, "process_count": 2}, "process_index"),
        ({"process_count": 0}, "process_count"),
        ({"seed": -1}, "seed"),
        ({"start_step": -1}, "start_step"),
        ({"workers": -1}, "workers"),
    ],
)
def test_impossible_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        take(numbers(), 0, **options)


def test_impossible_evaluation() -> None:
    with pytest.raises(InputError, match="no image"):
        evaluation(numbers(evaluation=0), batch_size=8)
    with pytest.raises(InputError, match="batch_size"):
        evaluation(numbers(), batch_size=3, process_count=2)


def test_load_dataset_from_a_config() -> None:
    config = ml_collections.ConfigDict({"source": "digits", "workers": 2})
    dataset = datasets.load_dataset(config)
    assert len(dataset.train) == 1437
    assert len(dataset.evaluation) == 360
    assert dataset.class_names == tuple("0123456789")
    assert dataset.preprocessing.size == 32
    assert dataset.augment is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [({"source": "digit"}, "'digits'"), ({}, "'digits'"), ({"source": "digits", "rot": 5}, "'rot'")],
)
def test_unknown_source_or_option(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        datasets.load_dataset(config)


def test_missing_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match=r"pip install 'msvmamba_jax\[data\]'"):
        take(numbers(), 1)
