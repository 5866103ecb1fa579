"""Pictures show the right colour at the right place, and sheets hold what they are given."""

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances

from ovseg_d2 import visualization
from ovseg_d2.evaluation.panoptic_png import write_panoptic_png
from ovseg_d2.visualization import ResultDrawer, contact_sheet, ground_truth_results, legible_scale, palette

GRASS, CAT = 0, 1
COLORS = [(0.1, 0.7, 0.2), (0.9, 0.2, 0.2)]
IMAGE = np.full((120, 160, 3), 128, dtype=np.uint8)
LABELS = np.full((120, 160), -1)
LABELS[60:] = GRASS
LABELS[10:50, 20:80] = CAT
# Places away from edges and names.
ON_GRASS, ON_CAT, ON_NOTHING = (110, 5), (14, 26), (5, 150)


@pytest.fixture
def drawer():
    return ResultDrawer(class_names=["grass", "cat"], class_colors=COLORS)


def results() -> dict:
    instances = Instances(LABELS.shape)
    instances.pred_masks = torch.from_numpy(np.stack([LABELS == CAT, LABELS == GRASS]))
    instances.scores = torch.tensor([0.9, 0.3])
    instances.pred_classes = torch.tensor([CAT, GRASS])
    segments = [{"id": 1, "category_id": GRASS, "isthing": False}, {"id": 2, "category_id": CAT, "isthing": True}]
    return {
        "sem_seg": torch.from_numpy(LABELS),
        "panoptic_seg": (torch.from_numpy(LABELS + 1), segments),
        "instances": instances,
    }


def blended(color) -> list:
    return pytest.approx([0.45 * 128 + 0.55 * 255 * channel for channel in color], abs=2)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("scale", [1, 3])
def test_colours_and_places(drawer, task, scale):
    picture = drawer.draw(IMAGE, results(), task, scale=scale)
    assert picture.shape == (120 * scale, 160 * scale, 3) and picture.dtype == np.uint8
    grass, cat, nothing = (picture[y * scale, x * scale].tolist() for y, x in (ON_GRASS, ON_CAT, ON_NOTHING))
    assert grass == blended(COLORS[GRASS]) and cat == blended(COLORS[CAT])
    assert nothing == [128, 128, 128]
    assert (picture == drawer.draw(IMAGE, results(), task, scale=scale)).all()


def test_score_threshold(drawer):
    picture = drawer.draw(IMAGE, results(), "instance", score_threshold=0.5)
    assert picture[ON_CAT].tolist() == blended(COLORS[CAT])
    assert picture[ON_GRASS].tolist() == [128, 128, 128]


def test_class_scores_are_drawn_by_their_maximum(drawer):
    scores = torch.stack([torch.from_numpy(LABELS == GRASS), torch.from_numpy(LABELS == CAT)]).float()
    picture = drawer.draw(IMAGE, {"sem_seg": scores}, "semantic")
    assert picture[ON_CAT].tolist() == blended(COLORS[CAT])


def test_instances_of_a_class_differ(drawer):
    segments = [{"id": i, "category_id": CAT, "isthing": True} for i in (1, 2)]
    picture = drawer.draw(IMAGE, {"panoptic_seg": (torch.from_numpy(LABELS + 1), segments)}, "panoptic")
    assert np.abs(picture[ON_GRASS].astype(int) - picture[ON_CAT]).max() > 20


def test_small_segments_are_drawn_over_large_ones(drawer):
    instances = Instances(LABELS.shape)
    instances.pred_masks = torch.from_numpy(np.stack([LABELS == CAT, np.ones_like(LABELS, dtype=bool)]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.9]), torch.tensor([CAT, GRASS])
    picture = drawer.draw(IMAGE, {"instances": instances}, "instance")
    assert picture[ON_CAT][0] > picture[ON_CAT][1] and picture[ON_NOTHING].tolist() == blended(COLORS[GRASS])


def test_nothing_found_leaves_the_image(drawer):
    empty = {"panoptic_seg": (torch.zeros(120, 160, dtype=torch.int32), [])}
    assert (drawer.draw(IMAGE, empty, "panoptic") == IMAGE).all()


def test_what_nothing_covers_can_be_hatched(drawer):
    picture = drawer.draw(IMAGE, results(), "semantic", hatch_rest=True)
    assert picture[ON_CAT].tolist() == blended(COLORS[CAT])
    rest = picture[10:50, 100:].reshape(-1, 3)
    assert len(np.unique(rest, axis=0)) == 2 and (rest.std(axis=1) == 0).all()
    masks = torch.from_numpy(LABELS == GRASS)[None]
    hatched = drawer.draw_masks(IMAGE, torch.tensor([GRASS]), masks, hatch_rest=True)
    assert hatched[ON_GRASS].tolist() == blended(COLORS[GRASS]) and hatched[ON_CAT].tolist() != [128, 128, 128]


def test_names_do_not_lie_on_each_other(drawer, monkeypatch):
    boxes = []

    def spy(_, text, position, *, font_size, **options):
        width, height = 0.6 * font_size * 100 / 72 * len(text), font_size * 100 / 72
        boxes.append((position[0] - width / 2, position[1], position[0] + width / 2, position[1] + height))

    monkeypatch.setattr(visualization.Visualizer, "draw_text", spy)
    masks = torch.zeros(5, 240, 320, dtype=torch.bool)
    masks[:, 40:200, 60:260] = True
    drawer.draw_masks(np.zeros((240, 320, 3), dtype=np.uint8), torch.tensor([GRASS, CAT, CAT, GRASS, CAT]), masks)
    assert len(boxes) == 5
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert 60 < (left + right) / 2 < 260 and 40 < (top + bottom) / 2 < 200
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_unknown_task(drawer):
    with pytest.raises(ValueError, match="task 'depth' is unknown, allowed are semantic, panoptic, instance"):
        drawer.draw(IMAGE, results(), "depth")


@pytest.mark.parametrize(
    ("metadata", "names", "colors"),
    [
        ({"stuff_classes": ["a", "b"], "stuff_colors": [(255, 0, 0), (0, 0, 255)]}, ("a", "b"), ((1, 0, 0), (0, 0, 1))),
        ({"thing_classes": ["a"], "thing_colors": [(0, 255, 0)]}, ("a",), ((0, 1, 0),)),
        ({"stuff_classes": ["a", "b"], "stuff_colors": [(255, 0, 0)]}, ("a", "b"), tuple(palette(2))),
        ({"thing_classes": ["a", "b"]}, ("a", "b"), tuple(palette(2))),
    ],
)
def test_names_and_colours_of_metadata(metadata, names, colors):
    drawer = ResultDrawer.from_metadata(Metadata(**metadata))
    assert (drawer.class_names, drawer.class_colors) == (names, colors)


def test_palette_colours_are_distinct():
    colors = np.array(palette(150))
    assert len(np.unique(colors.round(3), axis=0)) == 150
    assert np.linalg.norm(np.diff(colors, axis=0), axis=1).min() > 0.2  # neighbours can be told apart
    assert (0 <= colors).all() and (colors <= 1).all()


def test_ground_truth(drawer, tmp_path):
    write_panoptic_png(tmp_path / "ids.png", LABELS + 1)
    segments = [
        {"id": 1, "category_id": GRASS, "iscrowd": 0},
        {"id": 2, "category_id": CAT, "iscrowd": 0},
        {"id": 3, "category_id": CAT, "iscrowd": 1},
    ]
    record = {"pan_seg_file_name": str(tmp_path / "ids.png"), "segments_info": segments}
    truth = ground_truth_results(record, Metadata(thing_dataset_id_to_contiguous_id={7: CAT}))
    assert (truth["sem_seg"].numpy() == LABELS).all()
    assert [s["isthing"] for s in truth["panoptic_seg"][1]] == [False, True]
    assert truth["instances"].pred_classes.tolist() == [CAT]
    assert (truth["instances"].pred_masks[0].numpy() == (LABELS == CAT)).all()
    assert drawer.draw(IMAGE, truth, "instance")[ON_CAT].tolist() == blended(COLORS[CAT])


@pytest.mark.parametrize(("size", "scale"), [((128, 128), 3), ((64, 96), 4), ((300, 400), 1), ((1080, 1920), 1)])
def test_legible_scale(size, scale):
    assert legible_scale(*size) == scale


def test_contact_sheet():
    red, blue = (np.full((32, 48, 3), color, dtype=np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    sheet = contact_sheet([[red, blue], [blue, red]], columns=["image", "result"], captions=["a.jpg", "b.jpg"], cell=96)
    pixels = np.asarray(sheet).reshape(-1, 3)
    for color in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == color).all(axis=1).sum() == 2 * 96 * 64  # two pictures of each colour, enlarged twice
    plain = contact_sheet([[red, blue]], columns=["image", "result"], cell=96)
    assert sheet.width == plain.width and sheet.height > plain.height
    with pytest.raises(ValueError, match=r"2 column headings, but rows of \[1\] pictures"):
        contact_sheet([[red]], columns=["image", "result"])
