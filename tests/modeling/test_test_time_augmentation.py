"""Multi-scale testing with flip around models of this project and around one of our own making."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.inference.test_time_augmentation import MultiScaleFlip
from tests.helpers import random_input, randomise, tiny_cfg


class Colours(nn.Module):
    """The class scores of a pixel are its colours and, as a fourth one, the first proposal; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        self.seen += batched_inputs
        results = []
        for x in batched_inputs:
            maps = torch.cat([x["image"].float(), *([x["proposals"][:1].float()] if "proposals" in x else [])])
            size = (x["height"], x["width"])
            results.append({"sem_seg": F.interpolate(maps[None], size=size, mode="bilinear")[0], "other": None})
        return results


def augmented(model: nn.Module, **options: object) -> MultiScaleFlip:
    defaults = {"min_sizes": [32, 48], "max_size": 128, "flip": True, "image_format": "RGB"}
    return MultiScaleFlip(model=model, **{**defaults, **options}).eval()


@pytest.fixture
def model() -> nn.Module:
    return randomise(build_model(tiny_cfg(tasks=["semantic"]))).eval()


def test_one_size_without_flip_is_the_plain_model(model):
    x = random_input((40, 64), num_classes=5, num_masks=2)
    with torch.no_grad():
        plain = model([x])[0]["sem_seg"]
    assert torch.equal(augmented(model, min_sizes=[40], flip=False)([x])[0]["sem_seg"], plain)


def test_the_mean_by_hand(model):
    x = random_input((40, 64), num_classes=5, num_masks=2) | {"height": 50, "width": 70}
    found = augmented(model, min_sizes=[32, 40])([x, x])
    versions = []
    with torch.no_grad():
        for size in ((32, 51), (40, 64)):
            pixels = np.asarray(Image.fromarray(x["image"].permute(1, 2, 0).numpy()).resize(size[::-1], Image.BILINEAR))
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
            versions.append(model([{**x, "image": image}])[0]["sem_seg"])
            versions.append(model([{**x, "image": image.flip(-1)}])[0]["sem_seg"].flip(-1))
    assert set(found[0]) == {"sem_seg"} and found[0]["sem_seg"].shape == (5, 50, 70)
    torch.testing.assert_close(found[0]["sem_seg"], torch.stack(versions).mean(0))
    assert torch.equal(found[0]["sem_seg"], found[1]["sem_seg"])


def test_a_symmetric_picture_has_symmetric_scores(model):
    half = torch.randint(0, 256, (3, 48, 32), dtype=torch.uint8)
    x = {**random_input((48, 64), num_classes=5, num_masks=1), "image": torch.cat([half, half.flip(-1)], dim=2)}
    with torch.no_grad():
        plain = model([x])[0]["sem_seg"]
    scores = augmented(model, min_sizes=[48, 64])([x])[0]["sem_seg"]
    assert not torch.allclose(plain, plain.flip(-1), rtol=1e-3)
    torch.testing.assert_close(scores, scores.flip(-1))


def test_sizes_come_from_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    colours, small = Colours(), torch.zeros(3, 30, 40, dtype=torch.uint8)
    x = {"image": small, "file_name": str(tmp_path / "image.png"), "height": 60, "width": 80}
    found = augmented(colours, min_sizes=[60, 90], max_size=100, flip=False, image_format="BGR")([x])[0]["sem_seg"]
    assert [tuple(seen["image"].shape) for seen in colours.seen] == [(3, 60, 80), (3, 75, 100)]
    assert torch.equal(colours.seen[0]["image"], torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1))
    assert found.shape == (3, 60, 80) and torch.equal(x["image"], small)


def test_proposals_go_with_the_image():
    x = random_input((40, 60), num_classes=5, num_masks=3)
    x["proposals"] = x["instances"].gt_masks.tensor
    x["image"][0] = 255 * x["proposals"][0]
    colours = Colours()
    scores = augmented(colours, min_sizes=[40, 80])([x])[0]["sem_seg"]
    assert [tuple(seen["proposals"].shape) for seen in colours.seen] == [(3, 40, 60)] * 2 + [(3, 80, 120)] * 2
    assert all(seen["proposals"].dtype == torch.bool for seen in colours.seen)
    assert torch.equal(colours.seen[1]["proposals"], x["proposals"].flip(-1))
    # Channel 0 of the image and the first proposal are the same picture, but for what resizing blurs.
    assert (scores[0] / 255 - scores[3]).abs().mean() < 0.02


def test_scores_are_not_kept():
    alive: set[int] = set()

    class Score:
        """Stands for a map of scores; counts how many there are at once."""

        def __init__(self) -> None:
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

        def clone(self) -> "Score":
            return Score()

        def add_(self, other: "Score") -> "Score":
            return self

        def div_(self, count: int) -> "Score":
            assert count == 6
            return self

    most: list[int] = []
    model = nn.Module()
    model.forward = lambda inputs: [{"sem_seg": Score()}]
    x = random_input((40, 60), num_classes=5, num_masks=1)
    augmented(model, min_sizes=[32, 40, 48, 56, 64, 72], flip=False)([x])
    assert max(most) == 2


def test_the_model_is_not_changed_by_its_sum():
    kept: list[Tensor] = []

    class Keeps(Colours):
        def forward(self, batched_inputs: list[dict]) -> list[dict]:
            kept.append(super().forward(batched_inputs)[0]["sem_seg"])
            return [{"sem_seg": kept[-1]}]

    x = random_input((40, 60), num_classes=5, num_masks=1)
    augmented(Keeps(), min_sizes=[40, 40], flip=False)([x])
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.OVSEG.TEST.TASKS", ["semantic", "panoptic"], r"TEST.AUG.ENABLED .*TEST.TASKS is .*expected"),
        ("MODEL.OVSEG.TEST.ORACLE", "iou", "TEST.AUG.ENABLED .*ORACLE 'iou'"),
        ("TEST.AUG.MIN_SIZES", (), "MIN_SIZES is"),
        ("TEST.AUG.MIN_SIZES", (0, 32), "MIN_SIZES is"),
        ("TEST.AUG.MAX_SIZE", 1000, "MAX_SIZE is 1000; expected at least 1200"),
    ],
)
def test_wrong_options(key, value, message):
    cfg = tiny_cfg(tasks=["semantic"])
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        MultiScaleFlip.from_config(cfg, nn.Identity())


def test_the_config():
    cfg = tiny_cfg(tasks=["semantic"])
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = (32, 48), 64, False
    found = MultiScaleFlip.from_config(cfg, nn.Identity())
    assert [resize.short_edge_length for resize in found.resizes] == [(32, 32), (48, 48)]
    assert {resize.max_size for resize in found.resizes} == {64} and not found.flip
    assert found.image_format == cfg.INPUT.FORMAT
