"""Label maps from masks, and what compares logits with them."""

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.losses.pixel_losses import (
    IGNORED,
    pixel_binary_cross_entropy,
    pixel_cross_entropy,
    pixel_labels,
    text_pixel_alignment_loss,
)
from ovseg_d2.structures import SegmentationTargets


def random_targets(size: tuple[int, int], *counts: int) -> list[SegmentationTargets]:
    return [SegmentationTargets(torch.randint(0, 4, (count,)), torch.rand(count, *size) < 0.3) for count in counts]


def test_labels_are_the_class_of_the_first_mask():
    targets = random_targets((6, 7), 3, 0, 5)
    labels = pixel_labels(targets, (6, 7))
    assert labels.shape == (3, 6, 7) and labels.dtype == torch.int64
    assert (labels[1] == IGNORED).all()
    for found, target in zip(labels, targets, strict=True):
        for row in range(6):
            for column in range(7):
                there = target.class_ids[target.masks[:, row, column]].tolist()
                assert found[row, column] == (there[0] if there else IGNORED)


def test_ignored_pixels_have_no_gradient_but_count():
    logits = torch.randn(2, 4, 6, 7, requires_grad=True)
    labels = pixel_labels(random_targets((6, 7), 2, 0), (6, 7))
    loss = pixel_cross_entropy(logits, labels)
    loss.backward()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(loss, losses.mean())
    assert (logits.grad.abs().sum(1) > 0).equal(labels != IGNORED)


def test_logits_are_resized_and_float32():
    logits, labels = torch.randn(1, 4, 3, 2, dtype=torch.bfloat16), torch.randint(0, 4, (1, 9, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_cross_entropy(logits, labels)
    expected = F.cross_entropy(F.interpolate(logits.float(), size=(9, 8), mode="bilinear"), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def one_hot(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.stack([labels == k for k in range(num_classes)], dim=1).float()


@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_binary_cross_entropy_of_every_class(num_classes):
    logits, labels = torch.randn(2, num_classes, 3, 5), torch.randint(IGNORED, num_classes, (2, 11, 9))
    resized = F.interpolate(logits, size=(11, 9), mode="bilinear")
    probs, wanted = resized.sigmoid(), one_hot(labels, num_classes)
    expected = -(wanted * probs.log() + (1 - wanted) * (1 - probs).log()).mean()
    torch.testing.assert_close(pixel_binary_cross_entropy(logits, labels), expected)


def test_ignored_pixels_are_of_no_class():
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = pixel_binary_cross_entropy(logits, torch.full((2, 9, 8), IGNORED))
    loss.backward()
    assert loss.isfinite() and (logits.grad > 0).all()


@pytest.mark.parametrize("size", [(16, 24), (13, 17)])
def test_alignment_loss_of_the_code_compares_at_the_size_of_the_logits(size):
    logits, labels = torch.randn(2, 3, 4, 6), torch.randint(IGNORED, 3, (2, *size))
    wanted = F.interpolate(one_hot(labels, 3), size=(4, 6), mode="nearest")
    expected = F.binary_cross_entropy_with_logits(logits, wanted)
    torch.testing.assert_close(text_pixel_alignment_loss(logits, labels), expected)


def test_alignment_loss_of_the_paper_is_a_sum_of_squares_over_pixels():
    logits, labels = torch.randn(2, 3, 4, 6), torch.randint(IGNORED, 3, (2, 13, 17))
    gaps = F.interpolate(logits, size=(13, 17), mode="bilinear") - one_hot(labels, 3)
    expected = gaps.square().sum(dim=(2, 3)).mean()
    torch.testing.assert_close(text_pixel_alignment_loss(logits, labels, "mse"), expected)


def test_other_alignment_losses_are_refused():
    with pytest.raises(ValueError, match="kind is 'dice'; expected 'bce' or 'mse'"):
        text_pixel_alignment_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64), "dice")


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_binary_losses_are_float32_under_autocast(kind):
    logits, labels = torch.randn(1, 4, 3, 2, dtype=torch.bfloat16), torch.randint(0, 4, (1, 9, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = pixel_binary_cross_entropy(logits, labels), text_pixel_alignment_loss(logits, labels, kind)
    expected = (
        pixel_binary_cross_entropy(logits.float(), labels),
        text_pixel_alignment_loss(logits.float(), labels, kind),
    )
    torch.testing.assert_close(losses, expected)
