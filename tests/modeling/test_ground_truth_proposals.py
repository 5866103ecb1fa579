"""Masks of annotations as proposals."""

import pytest
import torch

from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.modeling.proposals.ground_truth import GroundTruthProposals
from ovseg_d2.structures import ImageBatch
from tests.helpers import tiny_cfg


def batch(*counts: int) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(count, 13, 17, generator=generator) < 0.3 for count in counts]
    sizes = [(13, 17)] * len(counts)
    return ImageBatch(torch.zeros(len(counts), 3, 13, 17), sizes, list(range(len(counts))), proposal_masks=masks)


def test_the_masks_and_nothing_else():
    images = batch(3, 1)
    images.proposal_masks[0][1] = False
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.NAME = "GroundTruthProposals"
    found = build_mask_proposals(cfg)(images)
    assert found.class_logits is None and found.valid.tolist() == [[True, False, True], [True, False, False]]
    for logits, masks in zip(found.mask_logits, images.proposal_masks, strict=True):
        assert (logits.sigmoid()[: len(masks)] > 0.5).equal(masks)  # no mask of what they leave over
        assert not (logits[len(masks) :] > 0).any()


def test_an_image_without_masks():
    found = GroundTruthProposals()(batch(0, 2))
    assert found.valid.tolist() == [[False, False], [True, True]] and found.mask_logits.isfinite().all()
    alone = GroundTruthProposals()(batch(0))
    assert alone.mask_logits.shape == (1, 1, 13, 17) and not (alone.mask_logits.sigmoid() > 0.5).any()


def test_no_masks_came():
    images = batch(1)
    images.proposal_masks, images.image_ids = None, ["street_7"]
    with pytest.raises(ValueError, match="^GroundTruthProposals: no masks came with image 'street_7'; .* annotation"):
        GroundTruthProposals()(images)
