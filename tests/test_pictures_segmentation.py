"""Pictures of segmented images: colours where the classes are, borders between them, a legend by area."""

import numpy as np
import pytest

from msvmamba_jax.data.ade20k import ade20k_class_names, ade20k_palette
from msvmamba_jax.pictures_segmentation import class_palette, segmentation_overlay, segmentation_sheet

NAMES = ("sky", "sea", "sand", "rock")
PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
GAP, LINE = 16, 20


def grey(height, width, value=100):
    return np.full((height, width, 3), value, np.uint8)


def halves(height, width):
    """Rock on the left (a quarter), sea on the right."""
    labels = np.full((height, width), 1, np.uint8)
    labels[:, : width // 4] = 3
    return labels


def blended(colour, value=100):
    return np.rint(0.4 * value + 0.6 * np.array(colour)).tolist()


def swatches(sheet, *, panels=1, width=512):
    """The colours down the legend, right of the panels."""
    x = panels * (width + GAP) + GAP + 7
    return [np.asarray(sheet)[y + 8, x].tolist() for y in range(GAP, sheet.height - GAP, LINE)]


def test_classes_lie_over_the_image():
    sheet = np.asarray(segmentation_overlay(grey(512, 512), halves(512, 512), NAMES, PALETTE))
    panel = sheet[GAP : GAP + 512, GAP : GAP + 512]
    assert panel[10, 10].tolist() == blended(PALETTE[3])
    assert panel[10, 300].tolist() == blended(PALETTE[1])
    # One line of one pixel between the two.
    white = (panel == 255).all(axis=2)
    assert white[:, 128].all()
    assert white.sum() == 512
    assert (sheet[:GAP] == 255).all()


def test_the_image_shines_through_in_grey():
    image = grey(512, 512)
    image[:, 256:] = (200, 0, 0)
    panel = np.asarray(segmentation_overlay(image, np.zeros((512, 512), int), NAMES, PALETTE))[GAP:, GAP:]
    assert panel[5, 400].tolist() == blended(PALETTE[0], 0.299 * 200)


@pytest.mark.parametrize("value", [255, 4, -1])
def test_what_is_no_class_stays_bare(value):
    labels = halves(512, 512).astype(int)
    labels[labels == 3] = value
    sheet = segmentation_overlay(grey(512, 512), labels, NAMES, PALETTE)
    assert np.asarray(sheet)[GAP + 5, GAP + 5].tolist() == [100, 100, 100]
    assert swatches(sheet)[:2] == [PALETTE[1].tolist(), [255, 255, 255]]


def test_the_legend_is_sorted_by_area():
    labels = halves(512, 512)
    labels[:10, 200:210] = 0
    sheet = segmentation_overlay(grey(512, 512), labels, NAMES, PALETTE)
    assert swatches(sheet)[:4] == [PALETTE[index].tolist() for index in (1, 3, 0)] + [[255, 255, 255]]


def test_truth_beside_the_prediction():
    prediction, truth = halves(400, 400), np.full((400, 400), 2, np.uint8)
    sheet = segmentation_overlay(grey(400, 400), prediction, NAMES, PALETTE, truth=truth)
    pixels = np.asarray(sheet)
    top = GAP + 22  # below the titles
    assert pixels[top + 50, GAP + 50].tolist() == blended(PALETTE[3])
    assert pixels[top + 50, GAP + 400 + GAP + 50].tolist() == blended(PALETTE[2])
    # The first line holds the titles; what is only true comes last.
    assert swatches(sheet, panels=2, width=400)[1:5] == [PALETTE[index].tolist() for index in (1, 3, 2)] + [
        [255, 255, 255]
    ]
    alone = segmentation_overlay(grey(400, 400), prediction, NAMES, PALETTE)
    assert sheet.width > alone.width + 400


def test_small_images_are_enlarged_and_borders_stay_thin():
    sheet = np.asarray(segmentation_overlay(grey(64, 60), halves(64, 60), NAMES, PALETTE))
    panel = sheet[GAP : GAP + 512, GAP : GAP + 480]
    white = (panel == 255).all(axis=2)
    assert white[:, 15 * 8].all()
    assert white.sum() == 512


def test_sheet_of_several_images():
    one, two = (grey(400, 400), halves(400, 400), halves(400, 400)), (grey(40, 60), halves(200, 300), halves(200, 300))
    palette = class_palette(NAMES)
    sheet = segmentation_sheet([one, two], NAMES)
    panels = [
        segmentation_overlay(grey(*labels.shape), labels, NAMES, palette, truth=labels) for labels in (one[1], two[1])
    ]
    assert sheet.size == (panels[0].width, panels[0].height + panels[1].height)
    np.testing.assert_array_equal(np.asarray(sheet)[: panels[0].height], panels[0])
    np.testing.assert_array_equal(np.asarray(sheet)[panels[0].height :, : panels[1].width], panels[1])


def test_many_classes_fit():
    names = ade20k_class_names()
    labels = np.arange(150).repeat(4).reshape(20, 30)
    sheet = segmentation_overlay(grey(20, 30), labels, names, class_palette(names))
    assert sheet.height == 340 + 2 * GAP  # enlarged 17 times; the legend is not longer
    assert segmentation_overlay(grey(2, 600), np.zeros((2, 600), int), names, class_palette(names)).height < 100


def test_palettes():
    np.testing.assert_array_equal(class_palette(ade20k_class_names()), ade20k_palette())
    palette = class_palette([f"class {i}" for i in range(254)])
    assert (palette.dtype, palette.shape) == (np.uint8, (254, 3))
    assert len(np.unique(palette, axis=0)) == 254
    np.testing.assert_array_equal(class_palette(NAMES), palette[:4])  # always the same
    # The first twenty lie far from each other, and none is near grey of any brightness.
    first = palette[:20].astype(float)
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1)
    assert distance[~np.eye(20, dtype=bool)].min() > 60
    assert (palette.max(axis=1) - palette.min(axis=1).astype(int) > 8).all()
