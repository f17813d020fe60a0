"""What a run measures of itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.errors import InputError
from msvmamba_jax.training import watching


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(watching.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def slow(clock, seconds, **fields):
    while True:
        clock(seconds)
        yield {"image": np.zeros((4, 2, 2, 3), np.uint8), **fields}


def test_interval(clock, monkeypatch):
    monkeypatch.setattr(watching, "total", lambda value: 3 * value)  # as if of three processes
    interval = watching.Interval()
    batches = slow(clock, 1.0, corrupt=np.array([0, 1, 0, 1], np.int32))
    assert set(interval.next_batch(batches)) == {"image"}
    clock(100)  # compilation
    interval.add({"train/loss": 6.0, "train/learning_rate": 1.0})
    interval.restart_clock()
    for loss in (3.0, 0.0):
        interval.next_batch(batches)
        clock(3)
        interval.add({"train/loss": loss, "train/learning_rate": 2.0 + loss})
        with interval.paused():
            clock(50)  # evaluation
    metrics = interval.finish(batch_size=4)
    assert metrics["train/loss"] == 3.0
    assert metrics["train/learning_rate"] == 2.0
    assert metrics["train/images_per_second"] == pytest.approx(1.0)
    assert metrics["train/waiting_share"] == pytest.approx(0.25)
    assert metrics["train/corrupt_images"] == 18
    assert 0.01 < metrics["train/memory_gib"] < 1000

    interval.next_batch(slow(clock, 0.5))  # a new interval, data that count no damaged images
    clock(0.5)
    interval.add({"train/loss": 7.0})
    metrics = interval.finish(batch_size=4)
    assert metrics["train/loss"] == 7.0
    assert metrics["train/waiting_share"] == pytest.approx(0.5)
    assert "train/corrupt_images" not in metrics


def test_profile(tmp_path):
    profile = watching.Profile("2:4", tmp_path)
    told = []
    for step in range(6):
        told.append(profile.at(step))
        jax.block_until_ready(jnp.ones(3) + step)
    assert [message is not None for message in told] == [False] * 4 + [True, False]
    assert "steps 3 to 4" in told[4]
    assert str(tmp_path / "profile") in told[4]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert not any(profile.due(step) for step in range(9))  # once

    off = watching.Profile("", tmp_path / "off")
    assert [off.at(step) for step in range(3)] == [None] * 3
    assert not (tmp_path / "off").exists()


def test_profile_of_a_run_that_goes_on(tmp_path):
    within = watching.Profile("2:5", tmp_path / "within")
    assert [within.due(step) for step in (1, 3)] == [False, True]
    assert within.at(3) is None
    assert [within.due(step) for step in (4, 5)] == [False, True]
    assert "steps 4 to 4" in within.finish(4)  # the run ends before the range does
    assert within.finish(4) is None
    late = watching.Profile("2:5", tmp_path / "late")
    assert "steps 3 to 5 of config.profile are past" in late.at(7)
    assert late.at(8) is None
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("text", ["5", "5:5", "7:3", "a:b", "1:2:3"])
def test_impossible_profile(tmp_path, text):
    with pytest.raises(InputError, match="START:STOP"):
        watching.Profile(text, tmp_path)
