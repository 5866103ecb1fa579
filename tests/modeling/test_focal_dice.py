"""ZegCLIP's loss against plain formulas, pseudo labels of unseen classes, and what a training may know of them."""

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.losses import focal_dice
from ovseg_d2.modeling.losses.focal_dice import FocalDiceLoss, class_areas
from ovseg_d2.modeling.losses.pixel_losses import IGNORED
from ovseg_d2.modeling.losses.pseudo_labels import pseudo_labels, unseen_ids
from ovseg_d2.modeling.meta_arch.zero_shot_setting import check_setting
from ovseg_d2.structures import Vocabulary


def random_case(num_classes=4, size=(11, 9)):
    """Two images with ignored pixels, the second without the last class, and one without a label."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, num_classes, 4, 5)
    labels = torch.randint(IGNORED, num_classes, (3, *size))
    labels[1][labels[1] == num_classes - 1] = IGNORED
    labels[2] = IGNORED
    return logits, labels


def plain_losses(logits, labels, mask_ignored=False):
    """Map by map."""
    big = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    focal = dice = big.sum() * 0
    shown = 0
    for maps, image in zip(big, labels, strict=True):
        kept = image != IGNORED if mask_ignored else torch.ones_like(image, dtype=torch.bool)
        for k, x in enumerate(maps):
            inside = (image == k)[kept]
            p = x[kept].sigmoid()
            p_t, alpha_t = torch.where(inside, p, 1 - p), torch.where(inside, 0.25, 0.75)
            focal = focal + (-alpha_t * (1 - p_t) ** 2 * p_t.log()).sum() / max(len(p), 1)
            if inside.any():
                shown += 1
                dice = dice + 1 - (2 * p[inside].sum() + 1) / (p.sum() + inside.sum() + 1)
    return 100 * focal / max(shown, 1), dice / max(shown, 1)


@pytest.mark.parametrize("mask_ignored", [False, True])
@pytest.mark.parametrize("num_classes", [4, 1])
def test_losses_and_gradients_equal_plain_loops(num_classes, mask_ignored):
    logits, labels = random_case(num_classes)
    ours, plain = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = FocalDiceLoss(mask_ignored=mask_ignored)(ours, labels)
    expected = plain_losses(plain, labels, mask_ignored)
    for value, wanted in zip((losses["loss_focal"], losses["loss_dice"]), expected, strict=True):
        torch.testing.assert_close(value, wanted.float(), rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    sum(expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad.float(), rtol=1e-5, atol=1e-6)
    assert (ours.grad[2].abs().sum() > 0) != mask_ignored


@pytest.mark.parametrize("mask_ignored", [False, True])
def test_images_without_labels(mask_ignored):
    logits, labels = random_case()
    logits = logits.requires_grad_()
    losses = FocalDiceLoss(mask_ignored=mask_ignored)(logits, torch.full_like(labels, IGNORED))
    sum(losses.values()).backward()
    assert losses["loss_dice"] == 0 and (losses["loss_focal"] > 0) == (not mask_ignored)
    assert logits.grad.isfinite().all()


def test_weights_scale_and_float32_under_autocast():
    logits, labels = random_case()
    expected = FocalDiceLoss()(logits.bfloat16().float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = FocalDiceLoss(focal_weight=20.0, dice_weight=3.0)(logits.bfloat16(), labels)
    assert losses["loss_focal"].dtype == torch.float32
    torch.testing.assert_close(losses["loss_focal"] * 5, expected["loss_focal"])
    torch.testing.assert_close(losses["loss_dice"] / 3, expected["loss_dice"])


def test_two_processes_equal_one_on_the_whole_batch(monkeypatch):
    logits, labels = random_case()
    loss = FocalDiceLoss()
    whole = loss(logits, labels)
    mean = (class_areas(labels.flatten(1), 4) > 0).sum().float() / 2
    monkeypatch.setattr(focal_dice, "all_reduced_mean", lambda value: mean)
    first, second = loss(logits[:1], labels[:1]), loss(logits[1:], labels[1:])
    for name, value in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value)


def test_permuted_classes_have_the_same_loss():
    logits, labels = random_case()
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.where(labels == IGNORED, IGNORED, order.argsort()[labels.clamp(min=0)])
    torch.testing.assert_close(FocalDiceLoss()(logits[:, order], renamed), FocalDiceLoss()(logits, labels))


def test_class_areas():
    labels = torch.tensor([[2, IGNORED, 2], [IGNORED, IGNORED, IGNORED], [0, 3, 2]])
    assert class_areas(labels, 4).tolist() == [[0, 0, 2, 0], [0, 0, 0, 0], [1, 0, 1, 1]]


def test_unseen_pixels_get_the_best_unseen_class():
    logits, labels = torch.randn(2, 5, 3, 4, requires_grad=True), torch.randint(IGNORED, 5, (2, 10, 9))
    unseen = [1, 4]
    before = labels.clone()
    filled = pseudo_labels(logits, labels, unseen)
    assert torch.equal(labels, before) and filled.dtype == torch.int64 and not filled.requires_grad
    big = F.interpolate(logits, size=(10, 9), mode="bilinear", align_corners=False)
    is_unseen = (labels == 1) | (labels == 4)
    assert torch.equal(filled[~is_unseen], labels[~is_unseen])
    assert torch.equal(filled[is_unseen], torch.where(big[:, 1] >= big[:, 4], 1, 4)[is_unseen])
    # Which of the unseen classes a pixel is does not matter.
    assert torch.equal(pseudo_labels(logits, torch.where(labels == 4, 1, labels), unseen), filled)
    assert torch.equal(pseudo_labels(logits, labels, []), labels)


@pytest.mark.parametrize("wrong", [5, -1])
def test_unseen_classes_that_are_none(wrong):
    with pytest.raises(ValueError, match=f"unseen class {wrong}, expected 0..4$"):
        pseudo_labels(torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), [1, wrong])


def vocabulary(*is_seen):
    names = tuple(f"class {i}" for i in range(3))
    return Vocabulary(names=names, is_thing=(False,) * 3, is_seen=is_seen)


def test_unseen_ids():
    assert unseen_ids(vocabulary(True, False, False)) == [1, 2] and unseen_ids(vocabulary()) == []


@pytest.mark.parametrize(
    ("setting", "is_seen", "weights", "message"),
    [
        ("generalised", (), "", "KEY is 'generalised'; allowed are inductive, transductive, supervised"),
        ("inductive", (True, False, False), "", "DATASETS.TRAIN names 2 unseen classes of 3, the first is 'class 1'"),
        ("transductive", (True, False, True), "", "and MODEL.WEIGHTS is empty; expected the checkpoint"),
        ("transductive", (True, True, True), "half.pth", "none of the 3 classes of DATASETS.TRAIN is unseen"),
        ("transductive", (), "half.pth", "none of the 3 classes of DATASETS.TRAIN is unseen"),
    ],
)
def test_settings_that_do_not_fit(setting, is_seen, weights, message):
    with pytest.raises(ValueError, match=message) as error:
        check_setting(setting, trained=vocabulary(*is_seen), weights=weights, key="KEY")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "is_seen", "weights"),
    [
        ("inductive", (True, True, True), ""),
        ("inductive", (), ""),
        ("transductive", (True, False, True), "half.pth"),
        ("supervised", (True, False, True), ""),
    ],
)
def test_settings_that_fit(setting, is_seen, weights):
    check_setting(setting, trained=vocabulary(*is_seen), weights=weights, key="KEY")
    check_setting(setting, trained=None, weights=weights, key="KEY")
