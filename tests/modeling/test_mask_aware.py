"""MAFT's losses, against plain loops over masks, proposals and pixels."""

import math

import pytest
import torch

from ovseg_d2.modeling.losses.mask_aware import KINDS, MaskAwareLoss, distill_loss, normalized_iou, soft_iou
from ovseg_d2.structures import SegmentationTargets

N, Q, K, H, W = 2, 5, 4, 6, 7


def make(seed=0, num_masks=(2, 3)):
    """CLIP's probabilities (N, Q, K), soft masks (N, Q, H, W) and targets."""
    generator = torch.Generator().manual_seed(seed)
    clip_probs = torch.randn(N, Q, K, generator=generator).softmax(-1)
    mask_probs = torch.rand(N, Q, H, W, generator=generator)
    targets = [
        SegmentationTargets(torch.randperm(K, generator=generator)[:m], torch.rand(m, H, W, generator=generator) > 0.6)
        for m in num_masks
    ]
    return clip_probs, mask_probs, targets


def plain_iou(probs, gt):
    intersection = union = 0.0
    for p, g in zip(probs.flatten().tolist(), gt.flatten().tolist(), strict=True):
        intersection += p * g
        union += p + g - p * g
    return intersection / union


def plain_row(kind, scores, targets):
    """The errors of one ground-truth mask."""
    errors = []
    for s, t in zip(scores, targets, strict=True):
        d = abs(s - t)
        kl = sum(a * math.log(a / b) for a, b in ((t, s), (1 - t, 1 - s)) if a > 0)
        errors.append({"l1": d, "l2": d * d, "smooth_l1": 0.5 * d * d if d < 1 else d - 0.5, "kl": kl}[kind])
    return errors


def plain_loss(kind, clip_probs, mask_probs, targets, valid=None):
    errors = []
    for n, target in enumerate(targets):
        used = [q for q in range(Q) if valid is None or valid[n, q]]
        for class_id, gt in zip(target.class_ids.tolist(), target.masks, strict=True):
            ious = [plain_iou(mask_probs[n, q], gt) for q in used]
            low, high = min(ious), max(ious)
            norm = [(iou - low) / (high - low) for iou in ious]
            errors += plain_row(kind, [clip_probs[n, q, class_id].item() for q in used], norm)
    return sum(errors) / len(errors)


def test_soft_iou():
    _, mask_probs, targets = make()
    found = soft_iou(mask_probs[0], targets[0].masks)
    expected = [[plain_iou(probs, gt) for probs in mask_probs[0]] for gt in targets[0].masks]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    hard = (mask_probs[0] > 0.5).float()
    same = soft_iou(hard, hard.bool())
    torch.testing.assert_close(same.diagonal(), torch.ones(Q))
    empty = soft_iou(torch.zeros(1, H, W), torch.zeros(1, H, W, dtype=torch.bool))
    assert empty.item() == 0


def test_normalised_iou():
    iou = torch.tensor([[0.2, 0.5, 0.8], [0.1, 0.1, 0.1]])
    torch.testing.assert_close(normalized_iou(iou), torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]))
    # Of what only fills the batch neither the best nor the worst counts.
    valid = torch.tensor([True, True, False])
    torch.testing.assert_close(normalized_iou(iou, valid)[0], torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_against_loops(kind):
    clip_probs, mask_probs, targets = make()
    found = MaskAwareLoss(kind=kind)(clip_probs, mask_probs, targets)
    torch.testing.assert_close(found.item(), plain_loss(kind, clip_probs, mask_probs, targets), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_fill_the_batch(kind):
    clip_probs, mask_probs, targets = make()
    valid = torch.tensor([[True, False, True, True, False], [True] * 4 + [False]])
    loss = MaskAwareLoss(kind=kind)
    found = loss(clip_probs, mask_probs, targets, valid)
    expected = plain_loss(kind, clip_probs, mask_probs, targets, valid)
    torch.testing.assert_close(found.item(), expected, rtol=1e-4, atol=1e-6)
    # Whatever they hold, they change nothing.
    clip_probs[~valid], mask_probs[~valid] = float("nan"), float("nan")
    torch.testing.assert_close(loss(clip_probs, mask_probs, targets, valid), found)


def test_gradients_are_of_present_classes_and_real_proposals():
    clip_probs, mask_probs, targets = make()
    valid = torch.tensor([[True, False, True, True, False], [True] * 5])
    clip_probs, mask_probs = clip_probs.requires_grad_(), mask_probs.requires_grad_()
    MaskAwareLoss()(clip_probs, mask_probs, targets, valid).backward()
    assert mask_probs.grad is None  # the proposals are judged, not trained
    present = torch.zeros(N, Q, K, dtype=torch.bool)
    for n, target in enumerate(targets):
        present[n][:, target.class_ids] = True
    assert torch.equal(clip_probs.grad != 0, present & valid[..., None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_masks", [(0, 0), (2, 0)])
def test_images_without_targets(kind, num_masks):
    clip_probs, mask_probs, targets = make(num_masks=num_masks)
    clip_probs.requires_grad_()
    loss = MaskAwareLoss(kind=kind)(clip_probs, mask_probs, targets)
    loss.backward()
    assert clip_probs.grad is not None and not clip_probs.grad[1].any()
    if any(num_masks):
        alone = MaskAwareLoss(kind=kind)(clip_probs[:1], mask_probs[:1], targets[:1])
        torch.testing.assert_close(loss, alone)
    else:
        assert loss.item() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_queries", "given"), [(0, True), (0, False), (Q, True)])
def test_images_without_proposals(kind, num_queries, given):
    """None at all, or none that is real."""
    clip_probs, mask_probs, targets = make()
    clip_probs.requires_grad_()
    valid = torch.zeros(N, num_queries, dtype=torch.bool) if given else None
    loss = MaskAwareLoss(kind=kind)(clip_probs[:, :num_queries], mask_probs[:, :num_queries], targets, valid)
    loss.backward()
    assert loss.item() == 0 and clip_probs.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_empty_masks_and_proposals(kind):
    clip_probs, mask_probs, targets = make()
    mask_probs[0, :2] = 0.0
    targets[0].masks[0] = False  # a class that a crop has cut off
    clip_probs[0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # logarithms of zeros
    clip_probs.requires_grad_()
    loss = MaskAwareLoss(kind=kind)(clip_probs, mask_probs, targets)
    loss.backward()
    assert loss.isfinite() and clip_probs.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_like_the_iou_costs_nothing(kind):
    _, mask_probs, targets = make(num_masks=(1, 1))
    clip_probs = torch.zeros(N, Q, K)
    for n, target in enumerate(targets):
        clip_probs[n][:, target.class_ids] = normalized_iou(soft_iou(mask_probs[n], target.masks)).T
    loss = MaskAwareLoss(kind=kind)
    assert abs(loss(clip_probs, mask_probs, targets).item()) < 1e-6
    assert loss(clip_probs.flip(1), mask_probs, targets).item() > 1e-2


def test_half_precision():
    clip_probs, mask_probs, targets = make()
    found = MaskAwareLoss()(clip_probs.bfloat16(), mask_probs, targets)
    torch.testing.assert_close(found, MaskAwareLoss()(clip_probs, mask_probs, targets), rtol=2e-2, atol=1e-3)


def test_the_iou_of_large_masks_under_autocast():
    """Areas of thousands of pixels are no numbers of half precision."""
    generator = torch.Generator().manual_seed(0)
    probs, gt = torch.rand(4, 120, 130, generator=generator), torch.rand(3, 120, 130, generator=generator) > 0.5
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_iou(probs.bfloat16().float(), gt)
    torch.testing.assert_close(found, soft_iou(probs.bfloat16().float(), gt))


def test_distillation():
    student, teacher = torch.randn(2, N, K, generator=torch.Generator().manual_seed(0)) * 3
    p, q = student.softmax(-1).flatten().tolist(), teacher.softmax(-1).flatten().tolist()
    expected = sum(0.5 * (a - b) ** 2 for a, b in zip(p, q, strict=True)) / (N * K)
    torch.testing.assert_close(distill_loss(student, teacher).item(), expected, rtol=1e-4, atol=1e-7)
    assert distill_loss(student, student + 5).item() < 1e-10  # probabilities, not logits


def test_kl_of_scores_that_are_zero_or_one():
    scores = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], requires_grad=True)
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 0, :2] = 1.0
    target = SegmentationTargets(torch.tensor([0]), masks[0, :1].bool())
    loss = MaskAwareLoss(kind="kl")(scores, masks, [target])
    loss.backward()
    assert 80 < loss.item() < 90 and scores.grad.isfinite().all()


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="MAFT.LOSS is 'huber'; allowed are smooth_l1, l1, l2, kl"):
        MaskAwareLoss(kind="huber")
