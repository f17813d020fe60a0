"""Pictures of detections: boxes and masks where the objects are, names that can be read, the truth beside."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from msvmamba_jax import pictures_detection
from msvmamba_jax.pictures_detection import detection_picture, detection_sheet

NAMES = ("cat", "baseball glove", "kite")
GAP, LINE = 16, 20


def grey(height, width, value=100):
    return np.full((height, width, 3), value, np.uint8)


def objects(image, *corners, labels=None):
    """Boxes, masks that fill them but for a pixel on each side, and labels."""
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), *image.shape[:2]), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[max(y1 + 1, 0) : y2 - 1, max(x1 + 1, 0) : x2 - 1] = True
    return boxes, masks, np.arange(len(boxes)) % len(NAMES) if labels is None else np.array(labels)


def colour(index):
    return list(pictures_detection._colour(index))


def blended(index, value=100):
    return np.rint(0.6 * value + 0.4 * np.array(colour(index))).tolist()


@pytest.fixture
def texts(monkeypatch):
    """Every text that is drawn."""
    drawn = []
    original = ImageDraw.ImageDraw.text

    def text(self, position, text, *arguments, **options):
        drawn.append(text)
        return original(self, position, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def test_boxes_and_masks_by_hand(texts):
    image = grey(600, 800)
    found = objects(image, (100, 100, 300, 250), (500, 300, 700, 500))
    picture = np.asarray(detection_picture(image, *found, np.array([0.9, 0.95]), NAMES))
    assert picture.shape == image.shape
    assert texts == ["baseball glove 0.95", "cat 0.90"]  # the best comes first
    for index, (x1, y1, x2, y2) in enumerate(((500, 300, 700, 500), (100, 100, 300, 250))):
        assert picture[y1 + 75, x1].tolist() == colour(index)  # the box
        assert picture[y1 + 75, x2 - 1].tolist() == colour(index)
        assert picture[y2 - 1, x1 + 75].tolist() == colour(index)
        assert picture[y1 + 75, x1 + 2].tolist() == colour(index)  # the line around the mask
        assert picture[y1 + 75, x1 + 75].tolist() == blended(index)
        assert picture[y1 + 75, x2 + 1].tolist() == [100] * 3
        assert picture[y1 - 5, x1 + 1].tolist() == colour(index)  # the name, above
    assert picture[50, 50].tolist() == [100] * 3


def test_only_what_is_likely_is_drawn(texts):
    image = grey(600, 800)
    found = objects(image, (100, 100, 300, 250), (500, 300, 700, 500), (300, 20, 400, 80))
    scores = np.array([0.29, 0.5, 0.3], np.float64)
    detection_picture(image, *found, scores, NAMES)
    assert texts == ["baseball glove 0.50", "kite 0.30"]
    texts.clear()
    detection_picture(image, *found, scores, NAMES, threshold=0.4)
    assert texts == ["baseball glove 0.50"]
    texts.clear()
    nothing = detection_picture(image, *found, scores, NAMES, threshold=0.6)
    assert texts == []
    np.testing.assert_array_equal(nothing, image)
    detection_picture(image, *found, None, NAMES)
    assert texts == list(NAMES)


def test_small_objects_lie_on_large_ones():
    image = grey(800, 800)
    found = objects(image, (300, 300, 400, 400), (100, 100, 700, 700))
    picture = np.asarray(detection_picture(image, *found, np.array([0.5, 0.9]), NAMES))
    inside = np.array(blended(0)) * 0.6 + 0.4 * np.array(colour(1))
    np.testing.assert_allclose(picture[350, 350], inside, atol=1)


def test_small_images_are_enlarged(texts):
    image = grey(100, 160)
    picture = detection_picture(image, *objects(image, (20, 20, 80, 80)), np.array([0.9]), NAMES)
    assert picture.size == (800, 500)
    pixels = np.asarray(picture)
    assert pixels[250, 250].tolist() == blended(0)
    assert pixels[250, 100].tolist() == pixels[250, 105].tolist() == colour(0)
    many = objects(image, *((x, y, x + 8, y + 8) for x in range(0, 150, 30) for y in range(0, 90, 30)))
    assert detection_picture(image, *many, np.ones(15), NAMES).size == (1280, 800)
    assert detection_picture(image, *(part[:0] for part in many), np.ones(0), NAMES).size == (800, 500)


def test_truth_is_drawn_beside_in_the_same_colours(texts):
    image = grey(500, 800)
    found = objects(image, (100, 100, 300, 250), (500, 300, 700, 500), labels=(2, 0))
    true = objects(image, (20, 300, 120, 400), (505, 300, 700, 490), (90, 100, 300, 250), labels=(1, 0, 2))
    picture = detection_picture(image, *found, np.array([0.9, 0.8]), NAMES, truth=true)
    assert picture.size == (2 * 800 + 3 * GAP, 500 + LINE + 2 * GAP)
    assert sorted(texts) == sorted([
        "kite 0.90", "cat 0.80", "cat", "kite", "baseball glove",
        "prediction: 2 objects with scores from 0.3", "truth: 3 objects",
    ])  # fmt: skip
    pixels = np.asarray(picture)
    left, right = (pixels[GAP + LINE :, x:] for x in (GAP, GAP + 800 + GAP))
    assert left[175, 200].tolist() == right[175, 200].tolist() == blended(0)
    assert left[400, 600].tolist() == right[400, 600].tolist() == blended(1)
    assert left[350, 70].tolist() == [100] * 3
    assert right[350, 70].tolist() == blended(2)
    # Nothing found, nothing there.
    texts.clear()
    empty = objects(image)
    detection_picture(image, *empty, np.zeros(0), NAMES, truth=empty)
    assert texts == ["prediction: 0 objects with scores from 0.3", "truth: 0 objects"]


def test_each_true_object_has_one_partner():
    true = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], float)
    found = np.array([[0, 0, 10, 8], [0, 0, 10, 10], [55, 50, 65, 60]], float)
    assert pictures_detection._partners(true, found) == [1, 0, 5]


def chips_of(boxes, size=(1280, 960), width=90, height=15):
    boxes = np.array(boxes, np.float64)
    return pictures_detection._places(boxes, [width] * len(boxes), height, size)


def area_in_common(chips):
    common = pictures_detection._common(chips, chips)
    return common[~np.eye(len(chips), dtype=bool)].sum()


def test_names_stand_above_their_boxes_where_there_is_room():
    np.testing.assert_array_equal(chips_of([(100, 100, 300, 300)]), [(100, 85, 190, 100)])
    # At the edge of the image inside the box, or beside one that is too small.
    np.testing.assert_array_equal(chips_of([(0, 0, 300, 300)]), [(0, 0, 90, 15)])
    np.testing.assert_array_equal(chips_of([(1240, 100, 1280, 300)]), [(1190, 85, 1280, 100)])


def test_names_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    for _ in range(5):
        corner, side = rng.uniform((0, 200), (1240, 760), (60, 2)), rng.uniform(10, 120, (60, 2))
        chips = chips_of(np.concatenate([corner, np.minimum(corner + side, (1280, 960))], axis=1))
        assert area_in_common(chips) == 0
        assert (chips[:, :2] >= 0).all()
        assert (chips[:, 2:] <= (1280, 960)).all()
    # Fifteen at one place, too.
    assert area_in_common(chips_of([(600, 400, 640, 420)] * 15)) == 0
    # Where there is no room at all they still stand in the image.
    chips = chips_of([(0, 0, 40, 30)] * 9, size=(100, 30))
    assert (chips >= 0).all()
    assert (chips[:, 2:] <= (100, 30)).all()


def test_names_keep_off_small_objects():
    large, small = (100, 100, 300, 300), (105, 70, 125, 99)
    chips = chips_of([large, small])
    assert pictures_detection._common(chips, np.array([small], float)).max() == 0


def test_a_line_leads_to_a_name_that_is_away(monkeypatch):
    image = grey(800, 800)
    lines = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "line", lambda self, *arguments: lines.append(arguments))
    # Nine names around an object that has room for four or so.
    found = objects(image, *[(390, 390, 410, 410)] * 9, labels=[1] * 9)
    detection_picture(image, *found, np.linspace(0.4, 0.9, 9), NAMES)
    assert 2 * 3 <= len(lines) < 2 * 9
    lines.clear()
    detection_picture(image, *(part[:1] for part in found), np.array([0.9]), NAMES)
    assert lines == []


def test_lines_are_drawn_in_the_objects_colour():
    panel = Image.new("RGB", (100, 100), "white")
    draw = ImageDraw.Draw(panel)
    box = np.array([60.0, 60, 80, 80])
    pictures_detection._lead(draw, np.array([10.0, 44, 40, 60]), box, (255, 0, 0))
    pixels = np.asarray(panel)
    assert (pixels == (255, 0, 0)).all(axis=2).sum() > 25
    assert pixels[60, 60].tolist() == [255, 0, 0]
    pictures_detection._lead(ImageDraw.Draw(panel), np.array([60.0, 44, 90, 60]), box, (0, 0, 255))
    assert not (np.asarray(panel) == (0, 0, 255)).all(axis=2).any()


def test_boxes_beyond_the_image_and_empty_masks():
    image = grey(400, 400)
    boxes = np.array([(-20, -20, 40, 40), (380, 380, 460, 450), (10.5, 200.2, 10.5, 200.2)], np.float32)
    masks = np.zeros((3, 400, 400), bool)
    masks[0, :40, :40] = True
    picture = detection_picture(image, boxes, masks, np.array([0, 1, 2]), np.full(3, 0.9), NAMES)
    assert picture.size == (800, 800)
    assert np.asarray(picture)[60, 60].tolist() == blended(0)


def test_colours_differ():
    colours = np.array([colour(index) for index in range(40)], float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distance[~np.eye(40, dtype=bool)].min() > 30
    assert colours.max(axis=1).min() >= 170
    colour(10_000)


def test_sheet_of_several_images():
    examples = []
    for width in (800, 500):
        image = grey(500, width)
        boxes, masks, labels = objects(image, (100, 100, 300, 250))
        examples.append((image, (boxes, masks, labels, np.array([0.9])), (boxes, masks, labels)))
    sheet = np.asarray(detection_sheet(examples, NAMES))
    assert sheet.shape == (2 * (500 + LINE + 2 * GAP), 2 * 800 + 3 * GAP, 3)
    second = sheet[500 + LINE + 2 * GAP :]
    assert second[GAP + LINE + 175, GAP + 200].tolist() == blended(0)
    assert second[GAP + LINE + 175, GAP + 500 + GAP + 200].tolist() == blended(0)
    assert second[GAP + LINE + 175, -100].tolist() == [255] * 3
