"""What stands for a region in MaskCLIP++'s training."""

import torch

from ovseg_d2.modeling.mask_classification.region_priors import (
    boxes_of,
    labelled_pixels,
    matched_masks,
    on_frame,
    regions_on_grid,
)
from ovseg_d2.structures import SegmentationTargets


def target(*boxes, class_ids=None, size=(32, 48)):
    """Masks that are the boxes (top, left, bottom, right)."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return SegmentationTargets(torch.tensor(class_ids or list(range(len(boxes))), dtype=torch.int64), masks)


def test_regions_of_unequal_images_fill_a_batch():
    targets = [target((0, 0, 16, 16), (0, 0, 1, 1), class_ids=[3, 5]), target()]
    regions = regions_on_grid(targets, (4, 6))
    assert regions.masks.shape == (2, 2, 4, 6)
    assert regions.valid.tolist() == [[True, True], [False, False]]
    assert regions.visible.tolist() == [[True, False], [False, False]]  # one pixel falls between the samples
    assert regions.class_ids.tolist() == [[3, 5], [0, 0]]
    assert regions.masks[0, 0].sum() == 4
    nothing = regions_on_grid([target(), target()], (4, 6))
    assert nothing.masks.shape == (2, 0, 4, 6) and nothing.visible.shape == (2, 0)


def test_masks_follow_another_padding():
    wanted = target((2, 3, 20, 40), class_ids=[3])
    wider = on_frame([wanted, target()], (40, 50))
    assert wider[0].class_ids.tolist() == [3]
    assert torch.equal(wider[0].masks, target((2, 3, 20, 40), size=(40, 50)).masks)
    assert wider[1].masks.shape == (0, 40, 50)
    assert torch.equal(on_frame(wider, (32, 48))[0].masks, wanted.masks)
    assert torch.equal(on_frame(wider, (24, 60))[0].masks, target((2, 3, 20, 40), size=(24, 60)).masks)


def test_pixels_have_the_class_of_the_mask_over_them():
    left, right = (0, 0, 32, 16), (0, 16, 32, 48)
    class_ids, used = labelled_pixels(regions_on_grid([target(left, right, class_ids=[7, 2])], (2, 3)))
    assert class_ids.view(2, 3).tolist() == [[7, 2, 2]] * 2 and used.all()
    class_ids, used = labelled_pixels(regions_on_grid([target(left, class_ids=[7])], (2, 3)))
    assert used.view(2, 3).tolist() == [[True, False, False]] * 2 and (class_ids[used] == 7).all()
    class_ids, used = labelled_pixels(regions_on_grid([target()], (2, 3)))
    assert class_ids.shape == used.shape == (1, 6) and not used.any()


def test_boxes_are_tight():
    masks = target((2, 3, 5, 7), (10, 20, 30, 40))
    masks.masks[0, 3, 4:6] = False  # a hole
    masks.masks[1] = torch.eye(32, 48, dtype=torch.bool)
    empty = target((0, 0, 0, 0))
    (boxes,), (nothing,) = boxes_of([masks]), boxes_of([empty])
    assert torch.equal(boxes.masks, target((2, 3, 5, 7), (0, 0, 32, 32)).masks)
    assert torch.equal(boxes.class_ids, masks.class_ids) and not nothing.masks.any()
    assert boxes_of([target()])[0].masks.shape == (0, 32, 48)


def test_matched_masks_are_the_best_pairs():
    wanted = target((0, 0, 10, 10), (0, 12, 10, 22), (20, 30, 30, 40), class_ids=[4, 5, 6])
    found = target((0, 12, 10, 21), (0, 0, 9, 10), (0, 1, 10, 23)).masks.float() * 0.9
    (matched,) = matched_masks([wanted], found[None])
    assert matched.class_ids.tolist() == [5, 4]  # in the order of the masks; nothing touches the third
    torch.testing.assert_close(matched.masks, found[:2])
    valid = torch.tensor([[True, False, False]])
    (matched,) = matched_masks([wanted], found[None], valid)
    assert matched.class_ids.tolist() == [5]
    # Under autocast, too: in half precision both would cover the same area.
    large, almost = target((0, 0, 60, 60), size=(64, 64)), target((0, 0, 50, 60), (0, 0, 50, 60), size=(64, 64))
    almost.masks[1, 50, 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        (matched,) = matched_masks([large], almost.masks[None].float())
    assert torch.equal(matched.masks[0], almost.masks[1].float())
    for one in matched_masks([target(), wanted], torch.zeros(2, 0, 32, 48)):
        assert one.masks.shape == (0, 32, 48)
