"""Crops of masks: boxes, resizing as torch does it, and which masks are encoded."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_prompts import MaskPrompts
from ovseg_d2.modeling.mask_classification.crops import (
    CropEncoder,
    expanded_boxes,
    masked_crops,
    region_boxes,
    region_images,
    resized_masks,
)
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals


def test_boxes_grow_and_stay_inside():
    boxes = torch.tensor([[2.0, 3, 6, 5], [0, 0, 10, 8], [9, 7, 10, 8]])
    assert expanded_boxes(boxes, 1.0, (8, 10)).equal(boxes)
    # Coordinates are cut, not rounded: 9.5 - 0.75 = 8.75 becomes 8.
    expected = torch.tensor([[1.0, 2, 7, 5], [0, 0, 10, 8], [8, 6, 10, 8]])
    assert expanded_boxes(boxes, 1.5, (8, 10)).equal(expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_crops_of_different_sizes_are_resized_as_torch_does(align_corners):
    torch.manual_seed(0)
    image, masks = torch.randn(3, 13, 17), torch.rand(4, 13, 17)
    boxes = torch.tensor([[0.0, 0, 17, 13], [3, 2, 4, 3], [5, 1, 6, 12], [2, 8, 16, 13]])
    fill = torch.randn(3, 1, 1)
    crops = masked_crops(image, masks, boxes, size=9, fill=fill, align_corners=align_corners)
    for crop, mask, (x0, y0, x1, y1) in zip(crops, masks, boxes.int().tolist(), strict=True):
        piece = (image * mask + fill * (1 - mask))[:, y0:y1, x0:x1]
        expected = F.interpolate(piece[None], size=(9, 9), mode="bicubic", align_corners=align_corners)[0]
        torch.testing.assert_close(crop, expected, atol=1e-5, rtol=1e-4)
    small = resized_masks(masks, boxes, size=9)
    for found, mask, (x0, y0, x1, y1) in zip(small, masks, boxes.int().tolist(), strict=True):
        assert found.equal(F.interpolate(mask[None, None, y0:y1, x0:x1], size=(9, 9), mode="nearest")[0, 0])


def test_zegformer_boxes_end_at_the_last_pixel():
    masks = torch.zeros(4, 6, 9, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 2, 2:7] = True  # a line
    masks[2, 0, 0] = masks[2, 5, 8] = True
    assert region_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 0, 9, 6], [0, 0, 8, 5], [0, 0, 9, 6]]


@pytest.mark.parametrize("style", ["mask", "crop", "cropmask"])
def test_regions_of_a_batch_are_those_of_its_images(style):
    torch.manual_seed(0)
    images, logits = torch.randn(2, 3, 24, 32), torch.randn(2, 3, 6, 8) * 5
    together = region_images(images, logits, style=style, size=16)
    alone = [region_images(images[i : i + 1], logits[i : i + 1], style=style, size=16)[0] for i in range(2)]
    torch.testing.assert_close(together, torch.stack(alone))
    if style == "crop":
        outside = logits.clone()
        outside[:, :, 1:-1, 1:-1] *= 1 + torch.rand(2, 3, 4, 6)  # the same boxes
        torch.testing.assert_close(region_images(images, outside, style=style, size=16).shape, together.shape)


class MeanColour(nn.Module):
    """An image encoder whose embedding is a picture's mean colour; it counts the pictures."""

    embed_dim = 3

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return ClipFeatures(image_embeds=images.mean((2, 3)), dense=None, layers={})


def quadrants() -> tuple[ImageBatch, MaskProposals]:
    """Two images of four colours, a mask a colour, one empty mask and one row of filling."""
    image = torch.zeros(2, 3, 16, 16)
    logits = torch.full((2, 6, 16, 16), -9.0)
    for q, (y, x) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        image[:, :, y : y + 8, x : x + 8] = torch.tensor([1.0 + q, -1.0, 2.0 * q]).view(3, 1, 1)
        logits[:, q, y : y + 8, x : x + 8] = 9.0
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[:, 5] = False
    return ImageBatch(image, [(16, 16), (16, 16)], [0, 1]), MaskProposals(mask_logits=logits, valid=valid)


@pytest.mark.parametrize("chunk_size", [1, 3, 32])
def test_mask_crop_encodes_only_masks_with_pixels(chunk_size):
    images, proposals = quadrants()
    visual = MeanColour()
    encoder = CropEncoder(style="mask_crop", size=8, chunk_size=chunk_size)
    embeds, valid = encoder(visual, images, proposals)
    assert valid.tolist() == [[True] * 4 + [False] * 2] * 2
    assert sum(visual.batches) == 8 and max(visual.batches) <= chunk_size
    expected = torch.tensor([[1.0 + q, -1.0, 2.0 * q] for q in range(4)])
    torch.testing.assert_close(embeds[:, :4], expected.expand(2, -1, -1))
    assert not embeds[:, 4:].any()


def test_padding_is_no_part_of_the_image():
    images, proposals = quadrants()
    images.image_sizes[1] = (16, 8)  # the right half is padding now
    _, valid = CropEncoder(style="mask_crop", size=8)(MeanColour(), images, proposals)
    assert valid[1].tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("style", ["mask", "crop", "cropmask"])
def test_zegformer_encodes_empty_masks_too(style):
    images, proposals = quadrants()
    visual = MeanColour()
    embeds, valid = CropEncoder(style=style, size=8)(visual, images, proposals)
    assert valid.equal(proposals.valid) and sum(visual.batches) == 10
    assert not embeds[:, 5].any() and embeds[:, :4].any()


def test_no_mask_at_all():
    images, proposals = quadrants()
    proposals.valid[:] = False
    embeds, valid = CropEncoder(style="mask_crop", size=8)(MeanColour(), images, proposals)
    assert embeds.shape == (2, 6, 3) and not embeds.any() and not valid.any()


@pytest.mark.parametrize("key", ["style", "fill"])
def test_unknown_options(key):
    options = {"style": "crop", "size": 8} | {key: "else"}
    with pytest.raises(ValueError, match=f"MODEL.OVSEG.CROPS.{key.upper()} is 'else'; allowed are"):
        CropEncoder(**options)


class Patchwork(MeanColour):
    """Two patches a side; the embedding is the number of patches that the prompts let through."""

    patch_size = 4

    def forward(self, images, *, prompts=None):
        kept = torch.ones(len(images), 4, 3) if prompts is None else prompts.start(torch.ones(len(images), 4, 3))
        return ClipFeatures(image_embeds=kept.sum(1), dense=None, layers={})


@pytest.mark.parametrize("chunk_size", [1, 32])
def test_mask_prompts_stand_for_patches_outside_of_the_mask(chunk_size):
    images, proposals = quadrants()
    proposals.mask_logits[0, 1, 8:, :8] = 9.0  # two opposite quadrants
    proposals.mask_logits[1, 2, 0, 14] = 9.0  # one pixel far away, which nearest neighbours find
    encoder = CropEncoder(style="mask_crop", size=8, chunk_size=chunk_size)
    prompts = MaskPrompts(depth=1, num_patches=4, dim=3)
    embeds, valid = encoder(Patchwork(), images, proposals, mask_prompts=prompts)
    assert valid.tolist() == [[True] * 4 + [False] * 2] * 2
    assert embeds[..., 0].tolist() == [[4, 2, 4, 4, 0, 0], [4, 4, 2, 4, 0, 0]]
    assert encoder(Patchwork(), images, proposals)[0][0, :4, 0].tolist() == [4, 4, 4, 4]


def test_mirrored_crops():
    images, proposals = quadrants()
    image, masks = torch.randn(3, 16, 16), proposals.mask_logits[0, :4] > 0
    masks[0, :4, :4] = False
    encoder = CropEncoder(style="mask_crop", size=8, chunk_size=3)
    boxes = torch.tensor([[0.0, 0, 8, 8], [4, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]])
    flipped = torch.tensor([True, False, True, False])
    seen = []

    class Keeper(Patchwork):
        def forward(self, images, *, prompts=None):
            seen.append((images, prompts.kept))
            return super().forward(images, prompts=prompts)

    prompts = MaskPrompts(depth=1, num_patches=4, dim=3)
    encoder.encode_boxes(Keeper(), image, masks, boxes, flipped=flipped, mask_prompts=prompts)
    crops, kept = (torch.cat(parts) for parts in zip(*seen, strict=True))
    seen.clear()
    encoder.encode_boxes(Keeper(), image, masks, boxes, mask_prompts=prompts)
    plain, plain_kept = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert kept[0].flatten().tolist() == [True, False, True, True]
    assert plain_kept[0].flatten().tolist() == [False, True, True, True]
    for i in range(4):
        assert crops[i].equal(plain[i].flip(-1) if flipped[i] else plain[i])
