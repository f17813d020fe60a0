"""Batches that workers hand over: nothing is lost, and no memory is used anew while somebody still reads it."""

from __future__ import annotations

import errno
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msvmamba_jax.data.handover import Receiver, Sender, Sent, shared_folder
from msvmamba_jax.errors import InputError


def examples(seed: int, count: int = 3, side: int = 61) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 256, (side, side, 3), np.uint8),
            "label": np.int32(rng.integers(1000)),
            "boxes": rng.normal(size=(700, 4)).astype(np.float32),
        }
        for _ in range(count)
    ]


def stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def assert_same(batch: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]]) -> None:
    expected = stacked(parts)
    assert batch.keys() == expected.keys()
    for name, array in expected.items():
        assert batch[name].dtype == array.dtype
        np.testing.assert_array_equal(batch[name], array)


@pytest.fixture
def send(tmp_path: Path) -> Any:
    sender = pickle.loads(pickle.dumps(Sender(str(tmp_path))))

    def through_a_queue(parts: list[dict[str, np.ndarray]]) -> Sent:
        return pickle.loads(pickle.dumps(sender(parts)))

    return through_a_queue


def test_a_batch_arrives(send: Any, tmp_path: Path) -> None:
    sent = send(examples(0))
    assert len(pickle.dumps(sent)) < 2000
    assert_same(Receiver()(sent), examples(0))
    assert not list(tmp_path.iterdir())  # nothing is left behind, whatever happens next


def test_memory_is_used_again_when_nobody_reads_it(send: Any) -> None:
    receive, regions = Receiver(), set()
    for seed in range(20):
        sent = send(examples(seed))
        regions.add(sent.path)
        batch = receive(sent)
        assert_same(batch, examples(seed))
        del batch
    assert len(regions) == 1


def test_memory_is_not_used_again_before(send: Any) -> None:
    receive = Receiver()
    on_their_way = [send(examples(seed)) for seed in range(3)]
    batches = [receive(sent) for sent in on_their_way]
    part = batches[1]["boxes"][1:, ::2]  # keeps its batch's memory by itself
    expected = part.copy()
    batches[1] = {}
    for seed in range(10, 15):
        assert_same(receive(send(examples(seed))), examples(seed))
    np.testing.assert_array_equal(part, expected)
    for seed in (0, 2):
        assert_same(batches[seed], examples(seed))
    batches.clear()
    del part
    paths = {sent.path for sent in on_their_way}
    held = [send(examples(seed)) for seed in range(3)]
    assert paths & {sent.path for sent in held}


def test_batches_of_other_sizes(send: Any) -> None:
    receive = Receiver()
    for seed, side in enumerate((61, 200, 90, 61, 300, 5)):
        assert_same(receive(send(examples(seed, 2, side))), examples(seed, 2, side))


def test_small_arrays_need_no_memory(send: Any) -> None:
    parts = [{"label": np.int32(number)} for number in range(5)]
    sent = send(parts)
    assert sent.region is None
    assert_same(Receiver()(sent), parts)


def test_examples_of_different_shapes(send: Any) -> None:
    with pytest.raises(ValueError, match="shape"):
        send([*examples(0, 1, 61), *examples(0, 1, 62)])


def test_a_full_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with shared_folder() as folder:
        monkeypatch.setattr(tempfile, "mkstemp", full)
        with pytest.raises(InputError, match="fewer workers"):
            Sender(folder)(examples(0))
