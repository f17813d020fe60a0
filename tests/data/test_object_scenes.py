"""Made-up scenes for detection: their objects, what hides what, and that all kinds of them occur."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from msvmamba_jax.data import object_scenes
from msvmamba_jax.data.object_scenes import ObjectScene, draw_object_scene
from msvmamba_jax.data.scenes import THINGS


@pytest.fixture(scope="module")
def drawn() -> list[ObjectScene]:
    rng = np.random.default_rng(0)
    return [draw_object_scene(np.random.default_rng(seed), *rng.integers(128, 193, 2)) for seed in range(80)]


def side(mask: np.ndarray) -> int:
    y, x = np.nonzero(mask)
    return int(max(np.ptp(y), np.ptp(x))) + 1


def parts(mask: np.ndarray) -> int:
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1


def test_instances(drawn: list[ObjectScene]) -> None:
    for image, instances in drawn:
        assert image.dtype == np.uint8
        assert len(instances) <= 8
        for label, mask, _ in instances:
            assert 0 <= label < len(THINGS)
            assert (mask.dtype, mask.shape) == (np.bool_, image.shape[:2])
            assert mask.sum() >= object_scenes._MIN_AREA
        if instances:
            covered = np.sum([instance.mask for instance in instances], axis=0)
            assert covered.max() == 1  # what hides another takes its pixels


def test_all_kinds_occur(drawn: list[ObjectScene]) -> None:
    counts = np.array([len(scene.instances) for scene in drawn])
    assert np.mean(counts >= 3) > 0.9
    assert set(counts) >= {3, 4, 5, 6, 7, 8}
    objects = [instance for scene in drawn for instance in scene.instances if not instance.crowd]
    assert {instance.label for instance in objects} == set(range(len(THINGS)))
    sides = np.array([side(instance.mask) for instance in objects])
    assert np.mean((sides >= 20) & (sides <= 90)) > 0.8
    assert (sides < 14).any()
    assert (sides > 110).any()
    crowds = [instance for scene in drawn for instance in scene.instances if instance.crowd]
    assert 3 <= len(crowds) <= 16
    assert max(parts(crowd.mask) for crowd in crowds) > 4
    assert sum(parts(instance.mask) > 1 for instance in objects) > 10  # cut by what lies across them


def test_a_scene_is_a_function_of_the_generator() -> None:
    first, second, other = (draw_object_scene(np.random.default_rng(seed), 130, 140) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.image, second.image)
    assert [i.label for i in first.instances] == [i.label for i in second.instances]
    assert (first.image != other.image).any()


def test_objects_are_where_their_masks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On black ground without bars, what is not black is an object."""
    black = np.zeros((128, 128, 3)), np.zeros((128, 128), np.uint8)
    monkeypatch.setattr(object_scenes, "draw_ground", lambda rng, height, width: black)
    monkeypatch.setattr(object_scenes, "_BAR", 0.0)
    for seed in range(8):
        image, instances = draw_object_scene(np.random.default_rng(seed), 128, 128)
        bright = image.astype(int).sum(axis=2) > 0
        covered = np.any([instance.mask for instance in instances], axis=0)
        assert bright[covered].mean() > 0.99
        assert bright[~covered].mean() < 0.08  # the soft half of the edges


def test_some_scenes_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_scenes, "_EMPTY", 1.0)
    image, instances = draw_object_scene(np.random.default_rng(0), 70, 80)
    assert image.shape == (70, 80, 3)
    assert instances == []


def test_half_of_every_object_stays_to_be_seen() -> None:
    rng = np.random.default_rng(0)
    canvas = object_scenes._Canvas(rng, 64, 64)
    colours = np.zeros((64, 64, 3))

    def part(top: int, bottom: int) -> np.ndarray:
        return np.pad(np.ones((bottom - top, 40)), ((top, 64 - bottom), (10, 14)))

    assert canvas.add(colours, part(10, 30), label=3)
    before = canvas.pixels.copy()
    assert not canvas.add(colours + 200, part(10, 21), label=4)
    np.testing.assert_array_equal(canvas.pixels, before)
    assert canvas.add(colours + 200, part(10, 20), label=4)
    assert [instance.mask.sum() for instance in canvas.instances] == [400, 400]
    assert not canvas.add(colours, part(25, 26))  # without a label, but it would leave too little of the first
    assert canvas.add(colours, part(40, 45))
    assert len(canvas.instances) == 2
    assert not canvas.add(colours, np.zeros((64, 64)), label=1)
    np.testing.assert_array_equal(canvas.pixels[15, 20], [200, 200, 200])
