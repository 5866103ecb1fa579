"""Masks that come with the images."""

import pytest
import torch

from ovseg_d2.modeling.meta_arch.mask2former import Mask2Former
from ovseg_d2.modeling.proposals.precomputed import PrecomputedProposals
from ovseg_d2.structures import ImageBatch
from tests.helpers import random_input, tiny_cfg


def batch(*counts: int) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(count, 12, 16, generator=generator) < 0.2 for count in counts]
    sizes = [(12, 16), (9, 11)][: len(counts)]
    for mask, (height, width) in zip(masks, sizes, strict=True):
        mask[:, height:] = False
        mask[:, :, width:] = False
    return ImageBatch(torch.zeros(len(counts), 3, 12, 16), sizes, list(range(len(counts))), proposal_masks=masks)


def test_rows_of_filling_are_not_valid():
    images = batch(2, 4)
    images.proposal_masks[0][1] = False  # a crop removed it
    found = PrecomputedProposals(residual_mask=False)(images)
    assert found.mask_logits.shape == (2, 4, 12, 16)
    assert found.valid.tolist() == [[True, False, False, False], [True] * 4]
    for logits, masks in zip(found.mask_logits, images.proposal_masks, strict=True):
        assert (logits[: len(masks)] > 0).equal(masks)
    assert set(found.mask_logits.sigmoid().round().unique().tolist()) == {0.0, 1.0}


def test_what_is_left_over_is_a_mask():
    images = batch(3, 0)
    found = PrecomputedProposals()(images).mask_logits > 0
    assert (found.sum(dim=1)[0] >= 1).all()
    assert found[0, 3].equal(~images.proposal_masks[0].any(0))
    inside = torch.zeros(12, 16, dtype=torch.bool)
    inside[:9, :11] = True
    assert found[1, 0].equal(inside)  # not the padding
    assert PrecomputedProposals()(images).valid.tolist() == [[True] * 4, [True, False, False, False]]


def test_no_masks():
    nothing = PrecomputedProposals(residual_mask=False)(batch(0, 0))
    assert nothing.mask_logits.shape == (2, 1, 12, 16) and not nothing.valid.any()
    images = batch(1)
    images.proposal_masks = None
    images.image_ids = ["street_7"]
    with pytest.raises(ValueError, match="no masks came with image 'street_7'; they are read from MODEL.OVSEG.PROP"):
        PrecomputedProposals()(images)


def test_preprocess_pads_the_masks():
    model = Mask2Former(tiny_cfg())
    inputs = [random_input(size, num_classes=5, num_masks=1, seed=i) for i, size in enumerate([(40, 50), (33, 61)])]
    assert model.preprocess(inputs).proposal_masks is None
    for x in inputs:
        x["proposals"] = torch.rand(3, *x["image"].shape[1:]) < 0.5
    masks = model.preprocess(inputs).proposal_masks
    assert [m.shape for m in masks] == [(3, 64, 64), (3, 64, 64)]
    assert masks[1][:, :33, :61].equal(inputs[1]["proposals"]) and not masks[1][:, 33:].any()
