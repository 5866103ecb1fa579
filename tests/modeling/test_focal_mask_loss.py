"""MaskFormer's criterion against plain loops, and what may go wrong with few or no masks."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.losses.focal_mask_loss import FocalMaskLoss
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.structures import MaskProposals
from tests.helpers import tiny_cfg
from tests.modeling.test_set_criterion import make_criterion, make_proposals, make_targets

SIZE, WEIGHTS = (7, 9), {"class_weight": 1.0, "mask_weight": 20.0, "dice_weight": 1.5}


def focal_criterion(**kwargs):
    return make_criterion(**({"mask_loss": FocalMaskLoss(), **WEIGHTS} | kwargs))


def plain_focal(logits, mask):
    """Mean over pixels of -alpha_t (1 - p_t)^2 log p_t (arXiv 1708.02002, equation 5), pixel by pixel."""
    values = []
    for x, inside in zip(logits.flatten().tolist(), mask.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        p_t, alpha_t = (p, 0.25) if inside else (1 - p, 0.75)
        values.append(-alpha_t * (1 - p_t) ** 2 * math.log(p_t))
    return sum(values) / len(values)


def plain_dice(logits, mask):
    probs = [1 / (1 + math.exp(-x)) for x in logits.flatten().tolist()]
    inside = [float(t) for t in mask.flatten().tolist()]
    overlap = sum(p * t for p, t in zip(probs, inside, strict=True))
    return 1 - (2 * overlap + 1) / (sum(probs) + sum(inside) + 1)


def nearest(mask, size):
    (big_h, big_w), (h, w) = mask.shape, size
    return torch.tensor([[bool(mask[y * big_h // h, x * big_w // w]) for x in range(w)] for y in range(h)])


def enlarged(logits, size):
    """Bilinear, corners not aligned, pixel by pixel: (h, w) -> size."""
    (h, w), (big_h, big_w) = logits.shape, size

    def places(i, small, big):
        position = min(max((i + 0.5) * small / big - 0.5, 0), small - 1)
        low = math.floor(position)
        return low, min(low + 1, small - 1), position - low

    rows = []
    for i in range(big_h):
        y0, y1, fy = places(i, h, big_h)
        row = []
        for j in range(big_w):
            x0, x1, fx = places(j, w, big_w)
            top = logits[y0, x0] * (1 - fx) + logits[y0, x1] * fx
            bottom = logits[y1, x0] * (1 - fx) + logits[y1, x1] * fx
            row.append(float(top * (1 - fy) + bottom * fy))
        rows.append(row)
    return torch.tensor(rows)


def plain_losses(proposals, targets, no_object_weight=0.1):
    """The whole criterion for one prediction, by trying all assignments."""
    num_masks = max(sum(len(target) for target in targets), 1)
    mask_loss = dice_loss = ce = ce_weight = 0.0
    for n, target in enumerate(targets):
        probs = proposals.class_logits[n].detach().softmax(-1)
        logits = proposals.mask_logits[n].detach()
        small = [nearest(mask, logits.shape[-2:]) for mask in target.masks]

        def cost(q, m, probs=probs, logits=logits, small=small, target=target):
            class_cost = -float(probs[q, target.class_ids[m]])
            return class_cost + 20.0 * plain_focal(logits[q], small[m]) + 1.5 * plain_dice(logits[q], small[m])

        table = [[cost(q, m) for m in range(len(target))] for q in range(len(logits))]
        best = min(
            itertools.permutations(range(len(logits)), len(target)),
            key=lambda chosen, table=table: sum(table[q][m] for m, q in enumerate(chosen)),
        )
        label_of = {q: int(target.class_ids[m]) for m, q in enumerate(best)}
        for q in range(len(logits)):
            label = label_of.get(q, probs.shape[-1] - 1)
            weight = 1.0 if q in label_of else no_object_weight
            ce -= weight * math.log(float(probs[q, label]))
            ce_weight += weight
        for m, q in enumerate(best):
            big = enlarged(logits[q], target.masks.shape[-2:])
            mask_loss += plain_focal(big, target.masks[m])
            dice_loss += plain_dice(big, target.masks[m])
    return {
        "loss_ce": ce / ce_weight,
        "loss_mask": 20.0 * mask_loss / num_masks,
        "loss_dice": 1.5 * dice_loss / num_masks,
    }


@pytest.mark.parametrize("counts", [[3, 1], [0, 2], [0, 0]])
@pytest.mark.parametrize("num_classes", [4, 1])
def test_criterion_equals_plain_loops(counts, num_classes):
    proposals = make_proposals(queries=4, num_classes=num_classes, size=SIZE, seed=1)
    targets = make_targets(counts, num_classes=num_classes, size=(24, 33))
    losses = focal_criterion(num_classes=num_classes)(proposals, targets, [0, 1])
    for prediction, suffix in ((proposals, ""), (proposals.aux[0], "_0")):
        for name, expected in plain_losses(prediction, targets).items():
            torch.testing.assert_close(losses.pop(name + suffix).item(), expected, rtol=1e-5, atol=1e-6)
    assert not losses


def test_costs_equal_plain_loops():
    proposals, targets = make_proposals(queries=3, size=SIZE, aux=0), make_targets([2, 0], size=(24, 33))
    costs = focal_criterion().matcher.costs(proposals, targets, None)
    assert costs[1].mask_cost.shape == costs[1].dice_cost.shape == costs[1].class_cost.shape == (3, 0)
    for q, m in itertools.product(range(3), range(2)):
        logits, mask = proposals.mask_logits[0, q].detach(), nearest(targets[0].masks[m], SIZE)
        torch.testing.assert_close(float(costs[0].mask_cost[q, m]), plain_focal(logits, mask), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(float(costs[0].dice_cost[q, m]), plain_dice(logits, mask), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_plain_formula():
    proposals, targets = make_proposals(n=1, queries=2, aux=0), make_targets([2])
    criterion = focal_criterion(no_object_weight=1.0)
    losses = criterion(proposals, targets, [0])
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    (queries, matched), leaf = criterion.matcher(proposals, targets, None)[0], proposals.mask_logits.detach().clone()
    leaf.requires_grad_()
    big = F.interpolate(leaf, size=targets[0].masks.shape[-2:], mode="bilinear")[0, queries].flatten(1)
    masks = targets[0].masks[matched].flatten(1).float()
    p_t = big.sigmoid() * masks + (1 - big.sigmoid()) * (1 - masks)
    focal = -(0.25 * masks + 0.75 * (1 - masks)) * (1 - p_t) ** 2 * p_t.log()
    dice = 1 - (2 * (big.sigmoid() * masks).sum(1) + 1) / (big.sigmoid().sum(1) + masks.sum(1) + 1)
    (20.0 * focal.mean(1).sum() / 2 + 1.5 * dice.sum() / 2).backward()
    torch.testing.assert_close(proposals.mask_logits.grad, leaf.grad)
    assert leaf.grad.abs().sum() > 0


def test_extreme_logits_give_finite_losses_and_gradients():
    proposals = make_proposals(aux=0)
    proposals.mask_logits.data *= 1e3
    losses = focal_criterion()(proposals, make_targets([2, 1]), [0, 1])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and proposals.mask_logits.grad.isfinite().all()


def test_no_targets_give_zero_but_connected_mask_losses():
    proposals = make_proposals()
    losses = focal_criterion()(proposals, make_targets([0, 0]), [0, 1])
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    sum(losses.values()).backward()
    for prediction in (proposals, *proposals.aux):
        assert prediction.class_logits.grad.abs().sum() > 0
        assert prediction.mask_logits.grad is not None and prediction.mask_logits.grad.abs().sum() == 0


def test_more_targets_than_queries_and_empty_masks():
    targets = make_targets([5, 1])
    targets[0].masks[:3] = False
    losses = focal_criterion()(make_proposals(queries=2), targets, [0, 1])
    assert all(loss.isfinite() for loss in losses.values())


def test_a_batch_is_the_mean_of_its_images_weighted_by_their_masks():
    proposals, targets = make_proposals(aux=0), make_targets([3, 1])
    criterion = focal_criterion()
    batch = criterion(proposals, targets, [0, 1])
    single = [
        criterion(MaskProposals(proposals.mask_logits[[i]], proposals.class_logits[[i]]), targets[i : i + 1], [i])
        for i in range(2)
    ]
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(batch[name], (3 * single[0][name] + single[1][name]) / 4)


def test_only_matched_masks_are_enlarged(monkeypatch):
    sizes = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, **kwargs: sizes.append((len(x), kwargs["mode"])) or interpolate(x, **kwargs)
    )
    losses = focal_criterion()(make_proposals(queries=6, aux=0), make_targets([2, 1]), [0, 1])
    assert sizes == [(2, "nearest"), (1, "nearest"), (2, "bilinear"), (1, "bilinear")]
    assert losses["loss_mask"] > 0


def test_no_full_size_map_is_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        losses = focal_criterion()(make_proposals(size=SIZE), make_targets([2, 1], size=(70, 90)), [0, 1])
    # But for the true masks, which are there anyway.
    assert kept and all(math.prod(x.shape[-2:]) < 70 * 90 for x in kept if x.dtype != torch.bool)
    sum(losses.values()).backward()


def test_without_deep_supervision_only_the_last_prediction_counts():
    losses = focal_criterion(deep_supervision=False)(make_proposals(aux=3), make_targets([2, 1]), [0, 1])
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}


def test_all_earlier_predictions_are_trained():
    losses = focal_criterion()(make_proposals(aux=10), make_targets([2, 1]), [0, 1])
    assert "loss_mask_9" in losses and len(losses) == 33


def test_config_chooses_the_loss():
    cfg = tiny_cfg()
    assert type(SetCriterion.from_config(cfg).mask_loss).__name__ == "PointMaskLoss"
    cfg.MODEL.OVSEG.LOSS.MASK_LOSS = "focal"
    criterion = SetCriterion.from_config(cfg)
    assert isinstance(criterion.mask_loss, FocalMaskLoss) and criterion.matcher.mask_loss is criterion.mask_loss
    cfg.MODEL.OVSEG.LOSS.MASK_LOSS = "area"
    with pytest.raises(ValueError, match="MODEL.OVSEG.LOSS.MASK_LOSS is 'area'; allowed are points, focal"):
        SetCriterion.from_config(cfg)
