"""Pixels vote for the classes of masks."""

import pytest
import torch

from ovseg_d2.modeling.inference.mask_voting import void_probs_of, voted_class_probs
from ovseg_d2.structures import MaskProposals


def test_the_mean_over_the_pixels_inside():
    pixel_probs = torch.rand(3, 4, 6)
    mask_logits = torch.full((3, 4, 6), -1.0)
    mask_logits[0, :2] = 0.5
    mask_logits[1, 3, 5] = 9.0
    scores = voted_class_probs(pixel_probs, mask_logits)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores[0, :3], pixel_probs[:, :2].mean((1, 2)))
    torch.testing.assert_close(scores[1, :3], pixel_probs[:, 3, 5])
    assert scores[:, 3].tolist() == [0, 0, 1] and not scores[2, :3].any()


def test_no_object_takes_its_part():
    pixel_probs, mask_logits = torch.rand(2, 3, 3), torch.ones(2, 3, 3)
    plain = voted_class_probs(pixel_probs, mask_logits)
    scores = voted_class_probs(pixel_probs, mask_logits, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(scores[0], torch.tensor([*(0.75 * plain[0, :2]).tolist(), 0.25]))
    assert scores[1].tolist() == [0, 0, 1]


def test_no_masks():
    assert voted_class_probs(torch.rand(2, 3, 3), torch.zeros(0, 3, 3)).shape == (0, 3)


@pytest.mark.parametrize("with_classes", [True, False])
def test_what_a_generator_says_of_no_object(with_classes):
    logits = torch.randn(2, 3, 5)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    proposals = MaskProposals(torch.randn(2, 3, 4, 4), class_logits=logits if with_classes else None, valid=valid)
    expected = logits.softmax(-1)[..., -1] if with_classes else torch.zeros(2, 3)
    expected[0, 2] = 1.0
    torch.testing.assert_close(void_probs_of(proposals), expected)
