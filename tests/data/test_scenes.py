"""Made-up scenes: labels and instances agree, all classes occur, and the image's edges are those of the labels."""

from __future__ import annotations

import numpy as np
import pytest

from msvmamba_jax.data import scenes
from msvmamba_jax.data.scenes import CLASSES, NOTHING, STUFF, THINGS, Scene, draw_scene


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [draw_scene(np.random.default_rng(seed), *rng.integers(64, 120, 2)) for seed in range(60)]


def test_labels_and_instances_agree(drawn: list[Scene]) -> None:
    count = 0
    for image, labels, instances in drawn:
        assert (image.dtype, labels.dtype) == (np.uint8, np.uint8)
        assert image.shape == (*labels.shape, 3)
        assert ((labels < len(CLASSES)) | (labels == NOTHING)).all()
        covered = np.zeros(labels.shape, int)
        for label, mask in instances:
            assert CLASSES[label] in THINGS
            assert mask.dtype == bool
            assert mask.shape == labels.shape
            assert mask.any()
            assert (labels[mask] == label).all()
            covered += mask
        assert covered.max() <= 1  # what hides another takes its pixels
        things = (labels >= len(STUFF)) & (labels != NOTHING)
        np.testing.assert_array_equal(covered > 0, things)
        count += len(instances)
    assert count > 120


def test_every_class_and_pixels_of_none_occur(drawn: list[Scene]) -> None:
    counts = sum(np.bincount(scene.labels.ravel(), minlength=256) for scene in drawn)
    share = counts / counts.sum()
    assert (share[: len(STUFF)] > 0.02).all()
    assert (share[len(STUFF) : len(CLASSES)] > 0.003).all()
    assert 0.001 < share[NOTHING] < 0.05


def test_a_scene_is_a_function_of_the_generator() -> None:
    first, second, other = (draw_scene(np.random.default_rng(seed), 70, 90) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert len(first.instances) == len(second.instances)
    assert (first.image != other.image).any()


def test_a_seed_keeps_its_scene() -> None:
    """What was made before is made again; only roundings may differ between machines."""
    first, second = (draw_scene(np.random.default_rng(seed), 96, 120) for seed in (0, 1))
    assert [CLASSES[label] for label, _ in first.instances] == ["star", "heart", "square"]
    assert [CLASSES[label] for label, _ in second.instances] == ["ring", "dice", "target", "star"]
    assert [int(mask.sum()) for _, mask in first.instances] == pytest.approx([215, 1034, 2332], abs=4)
    assert first.image.mean() == pytest.approx(137.752, abs=0.05)
    assert (first.labels == NOTHING).sum() == pytest.approx(147, abs=4)


def test_objects_stay_visible(drawn: list[Scene]) -> None:
    """Of every instance a third is left, also where later ones hide it: no slivers."""
    assert min(mask.sum() for scene in drawn for _, mask in scene.instances) >= 20 / 3
    rng = np.random.default_rng(0)
    sizes = [sum(mask.sum() for _, mask in draw_scene(rng, 100, 100).instances) for _ in range(5)]
    assert all(300 < size < 6000 for size in sizes)


def outline(name: str, *points: tuple[float, float]) -> list[bool]:
    u, v = np.array(points).T
    return (scenes._THINGS[name].shape(u, v) > 0).tolist()


def test_shapes_by_hand() -> None:
    assert outline("disc", (0, 0), (0.7, 0.7), (0.8, 0.8)) == [True, True, False]
    assert outline("square", (0.8, 0.8), (0.9, 0)) == [True, False]
    assert outline("triangle", (0, 0), (0, -1), (0.9, 0.5), (0.9, 0), (0, 0.6)) == [True, True, True, False, False]
    tips = [(np.cos(a), np.sin(a)) for a in 2 * np.pi / 5 * np.arange(5)]
    assert outline("star", (0, 0), *tips) == [True] * 6
    assert outline("star", *((-0.5 * x, -0.5 * y) for x, y in tips)) == [False] * 5
    assert outline("star", *((-0.4 * x, -0.4 * y) for x, y in tips)) == [True] * 5
    assert outline("cross", (0, 0), (0.9, 0), (0, 0.9), (0.5, 0.5)) == [True, True, True, False]
    assert outline("ring", (0, 0), (0.75, 0), (0, -0.9), (1.1, 0)) == [False, True, True, False]
    assert outline("crescent", (-0.8, 0), (0.5, 0), (-1.1, 0)) == [True, False, False]
    assert outline("heart", (0, 0), (0.5, -0.6), (-0.5, -0.6), (0, -0.9), (0, 0.95)) == [True, True, True, False, True]


def test_edges_of_the_image_lie_on_those_of_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one colour for all ground and no noise, every pixel away from an edge is plain."""
    monkeypatch.setattr(scenes, "_ground", lambda stuff, rng, height, width: np.zeros((height, width, 3)))
    monkeypatch.setattr(scenes, "draw_line", lambda rng, thickness, height, width: np.zeros((height, width)))
    for seed in range(5):
        image, labels, _ = draw_scene(np.random.default_rng(seed), 96, 96)
        thing = labels >= len(STUFF)
        bright = image.astype(int).sum(axis=2) > 0
        assert (bright[thing]).mean() > 0.99
        assert bright[~thing].mean() < 0.06  # the soft half of the edges
