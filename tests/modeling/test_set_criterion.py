"""Matching and set losses beyond the parity vectors."""

import torch

from ovseg_d2.modeling.losses.mask_losses import PointMaskLoss, pairwise_cross_entropy, pairwise_dice
from ovseg_d2.modeling.losses.matcher import HungarianMatcher
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.structures import MaskProposals, SegmentationTargets
from tests.parity_families.recorded import RecordedDraws


def make_criterion(num_classes=4, **kwargs):
    arguments = {
        "num_classes": num_classes,
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "no_object_weight": 0.1,
        "mask_loss": PointMaskLoss(num_points=16),
    }
    return SetCriterion(**(arguments | kwargs))


def make_proposals(n=2, queries=5, num_classes=4, size=(7, 9), aux=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def one():
        return MaskProposals(
            class_logits=torch.randn(n, queries, num_classes + 1, generator=generator).requires_grad_(),
            mask_logits=(3 * torch.randn(n, queries, *size, generator=generator)).requires_grad_(),
        )

    proposals = one()
    proposals.aux = [one() for _ in range(aux)]
    return proposals


def make_targets(counts, num_classes=4, size=(28, 36), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        SegmentationTargets(
            torch.randint(0, num_classes, (count,), generator=generator),
            torch.rand(count, *size, generator=generator) > 0.5,
        )
        for count in counts
    ]


def test_pairwise_costs_equal_their_definition():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 8), torch.rand(2, 8)
    cross_entropy, dice = pairwise_cross_entropy(logits, targets), pairwise_dice(logits.sigmoid(), targets)
    for q in range(3):
        for m in range(2):
            bce = torch.nn.functional.binary_cross_entropy_with_logits(logits[q], targets[m])
            p = logits[q].sigmoid()
            expected = 1 - (2 * (p * targets[m]).sum() + 1) / (p.sum() + targets[m].sum() + 1)
            torch.testing.assert_close(cross_entropy[q, m], bce)
            torch.testing.assert_close(dice[q, m], expected)


def test_class_cost_is_the_negative_probability():
    proposals, targets = make_proposals(aux=0), make_targets([3, 1])
    criterion = make_criterion()
    costs = criterion.matcher.costs(proposals, targets, criterion.sampler.start([0, 1], torch.device("cpu")))
    for i, target in enumerate(targets):
        for m, class_id in enumerate(target.class_ids):
            torch.testing.assert_close(costs[i].class_cost[:, m], -proposals.class_logits[i].softmax(-1)[:, class_id])


def test_perfect_predictions_are_matched_and_cost_little():
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[0, :, :5] = masks[1, :8, 5:] = masks[2, 8:, 5:] = True
    targets = [SegmentationTargets(torch.tensor([2, 0, 2]), masks)]
    order = torch.tensor([2, 0, 1])
    logits = torch.where(targets[0].masks[order], 20.0, -20.0)
    class_logits = torch.full((1, 3, 5), -20.0)
    class_logits[0, torch.arange(3), targets[0].class_ids[order]] = 20.0
    proposals = MaskProposals(class_logits=class_logits, mask_logits=logits[None])
    criterion = make_criterion(mask_loss=PointMaskLoss(num_points=400))
    queries, matched = criterion.matcher(proposals, targets, criterion.sampler.start([0], logits.device))[0]
    assert queries.tolist() == [0, 1, 2] and matched.tolist() == order.tolist()
    good = criterion(proposals, targets, [0])
    bad = criterion(MaskProposals(class_logits=class_logits, mask_logits=-logits[None]), targets, [0])
    # The points lie at the masks' edges by choice, where even a perfect mask is penalised.
    assert good["loss_ce"] < 1e-4
    assert good["loss_mask"] < 0.6 * bad["loss_mask"] and good["loss_dice"] < 0.6 * bad["loss_dice"]


def test_order_of_targets_does_not_matter():
    proposals, targets = make_proposals(n=1), make_targets([4])
    permuted = [SegmentationTargets(targets[0].class_ids.flip(0), targets[0].masks.flip(0))]
    a, b = (make_criterion()(proposals, t, ["x"]) for t in (targets, permuted))
    assert a.keys() == b.keys() == {f"loss_{x}{s}" for x in ("ce", "mask", "dice") for s in ("", "_0")}
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_more_targets_than_queries():
    losses = make_criterion()(make_proposals(queries=2), make_targets([5, 0]), [0, 1])
    assert all(loss.isfinite() for loss in losses.values())


def test_no_targets_give_zero_but_connected_mask_losses():
    proposals = make_proposals()
    losses = make_criterion()(proposals, make_targets([0, 0]), [0, 1])
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    sum(losses.values()).backward()
    for prediction in (proposals, *proposals.aux):
        assert prediction.class_logits.grad.abs().sum() > 0
        assert prediction.mask_logits.grad is not None and prediction.mask_logits.grad.abs().sum() == 0


def test_without_deep_supervision_only_the_last_prediction_counts():
    losses = make_criterion(deep_supervision=False)(make_proposals(), make_targets([2, 1]), [0, 1])
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}


def test_diverged_predictions_give_a_nan_loss_and_no_crash():
    proposals = make_proposals(aux=0)
    proposals.mask_logits.data[0] = float("nan")
    losses = make_criterion()(proposals, make_targets([2, 1]), [0, 1])
    assert losses["loss_mask"].isnan()


def test_matcher_uses_one_set_of_points_an_image():
    matcher = HungarianMatcher(
        class_weight=1.0, mask_weight=1.0, dice_weight=1.0, mask_loss=PointMaskLoss(num_points=6)
    )
    draws = RecordedDraws([torch.rand(1, 6, 2), torch.rand(1, 6, 2)])
    matcher(make_proposals(), make_targets([1, 2]), draws)
    assert not draws.draws


def test_matches_are_handed_out_for_every_prediction():
    """In the order of `aux`, then the proposals' own: true classes in one of them show whose is whose."""
    targets = make_targets([3, 0])
    targets[0].class_ids = torch.arange(3)
    for place in range(3):
        proposals = make_proposals(aux=2)
        perfect = [*proposals.aux, proposals][place]
        with torch.no_grad():
            rows = torch.tensor([4, 1, 2])
            perfect.mask_logits.zero_()
            perfect.class_logits[0, rows] = 20 * torch.eye(5)[:3]
        losses, matches = make_criterion().losses_and_matches(proposals, targets, [7, 8])
        assert losses == make_criterion()(proposals, targets, [7, 8]) and len(losses) == 9
        assert [[len(queries) for queries, _ in match] for match in matches] == [[3, 0]] * 3
        found = [set(zip(*(indices.tolist() for indices in match[0]), strict=True)) for match in matches]
        assert [pairs == {(4, 0), (1, 1), (2, 2)} for pairs in found] == [i == place for i in range(3)]
    losses, last = make_criterion(deep_supervision=False).losses_and_matches(proposals, targets, [7, 8])
    assert len(losses) == 3 and len(last) == 1
