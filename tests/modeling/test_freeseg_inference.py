"""FreeSeg's panoptic and instance results: by hand, against plain loops, against the public code where it is right."""

from pathlib import Path

import pytest
import torch

from ovseg_d2.modeling.inference.freeseg_inference import (
    freeseg_instance_inference,
    freeseg_panoptic_inference,
    named_masks,
)
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.mask_classification.host_ensemble import HostEnsemble
from tests.parity import load_case
from tests.test_parity import GOLDENS

THRESHOLDS = {"object_mask_threshold": 0.5, "overlap_threshold": 0.5}
IS_THING = torch.tensor([True, False, True])


def logits_of(masks, height=6.0):
    return torch.where(torch.as_tensor(masks).bool(), height, -height)


def rows_of(labels, num_classes=3, score=0.6):
    """Class scores (Q, K) that are decided for the labels."""
    probs = torch.full((len(labels), num_classes), 0.1)
    probs[torch.arange(len(labels)), torch.tensor(labels, dtype=torch.int64)] = score
    return probs


LEFT, RIGHT, WHOLE = [[1, 1, 0, 0]] * 3, [[0, 0, 1, 1]] * 3, [[1, 1, 1, 1]] * 3
CORNER = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def panoptic(labels, masks, **kwargs):
    return freeseg_panoptic_inference(rows_of(labels), logits_of(masks), is_thing=IS_THING, **(THRESHOLDS | kwargs))


def instances(labels, masks, scores=None, **kwargs):
    probs = rows_of(labels) if scores is None else scores
    return freeseg_instance_inference(probs, logits_of(masks), is_thing=IS_THING, **(THRESHOLDS | kwargs))


def test_things_are_apart_and_stuff_is_one():
    ids, segments = panoptic([2, 2], [LEFT, RIGHT])
    assert ids.dtype == torch.int32 and ids.tolist() == [[1, 1, 2, 2]] * 3
    assert segments == [{"id": 1, "isthing": True, "category_id": 2}, {"id": 2, "isthing": True, "category_id": 2}]
    ids, segments = panoptic([1, 1], [LEFT, RIGHT])
    assert ids.eq(1).all() and segments == [{"id": 1, "isthing": False, "category_id": 1}]


def test_a_mask_that_the_semantic_result_does_not_agree_with_is_dropped():
    probs = torch.cat([rows_of([1], score=0.9), rows_of([0], score=0.5)])
    ids, segments = freeseg_panoptic_inference(probs, logits_of([WHOLE, LEFT]), is_thing=IS_THING, **THRESHOLDS)
    assert ids.eq(1).all() and [segment["category_id"] for segment in segments] == [1]


def test_unclear_things_are_dropped_but_unclear_stuff_is_not():
    probs = torch.tensor([[0.104, 0.1, 0.1], [0.1, 0.104, 0.1]])
    scores = named_masks(probs, logits_of([LEFT, RIGHT])).scores
    assert scores.max() < 0.5
    ids, segments = freeseg_panoptic_inference(probs, logits_of([LEFT, RIGHT]), is_thing=IS_THING, **THRESHOLDS)
    assert ids.tolist() == [[0, 0, 1, 1]] * 3 and segments == [{"id": 1, "isthing": False, "category_id": 1}]


def test_a_segment_that_later_ones_cover_is_not_listed():
    ids, segments = panoptic([0, 0], [CORNER, LEFT])
    assert ids.tolist() == [[2, 2, 0, 0]] * 3 and [segment["id"] for segment in segments] == [2]
    ids, segments = panoptic([0, 0], [LEFT, CORNER])
    assert ids[0].tolist() == [2, 1, 0, 0] and [segment["id"] for segment in segments] == [1, 2]


def plain_panoptic(class_probs, mask_logits, is_thing, score_threshold, overlap_threshold):
    """Mask by mask, pixel by pixel."""
    probs = mask_logits.sigmoid()
    count, num_classes = class_probs.shape
    h, w = probs.shape[1:]
    semantic = [
        [
            max(range(num_classes), key=lambda k, y=y, x=x: float((class_probs[:, k] * probs[:, y, x]).sum()))
            for x in range(w)
        ]
        for y in range(h)
    ]
    ids, segments, stuff = [[0] * w for _ in range(h)], [], {}
    for q in range(count):
        sharpened = (class_probs[q] / 0.01).softmax(-1)
        label = int(sharpened.argmax())
        mask = [(y, x) for y in range(h) for x in range(w) if probs[q, y, x] >= 0.5]
        own = [(y, x) for y, x in mask if semantic[y][x] == label]
        thing = bool(is_thing[label])
        if not own or len(own) / len(mask) < overlap_threshold or (thing and sharpened[label] < score_threshold):
            continue
        if not thing and label in stuff:
            number = stuff[label]
        else:
            number = stuff[label] = len(segments) + 1
            segments.append({"id": number, "isthing": thing, "category_id": label})
        for y, x in own:
            ids[y][x] = number
    seen = {number for row in ids for number in row}
    return ids, [segment for segment in segments if segment["id"] in seen]


@pytest.mark.parametrize("seed", range(6))
def test_panoptic_equals_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(9, 2, generator=generator) * torch.tensor([7.0, 11.0])
    grid = torch.stack(torch.meshgrid(torch.arange(7.0), torch.arange(11.0), indexing="ij"), dim=-1)
    mask_logits = 3.0 - (grid - centres[:, None, None]).norm(dim=-1) * (0.7 + torch.rand(9, 1, 1, generator=generator))
    mask_logits[4] = -5.0
    class_probs = torch.rand(9, 4, generator=generator) ** 3
    is_thing = torch.tensor([True, False, True, False])
    got = freeseg_panoptic_inference(
        class_probs, mask_logits, is_thing=is_thing, object_mask_threshold=0.6, overlap_threshold=0.3
    )
    ids, segments = plain_panoptic(class_probs, mask_logits, is_thing, 0.6, 0.3)
    assert got[0].tolist() == ids and got[1] == segments and len(segments) >= 2


def test_instances_have_every_class_and_their_scores():
    result = instances(
        [2, 0, 1], [LEFT, RIGHT, CORNER], torch.cat([rows_of([2]), rows_of([0], score=0.13), rows_of([1])])
    )
    assert result.pred_classes.tolist() == [2, 0] and result.image_size == (3, 4)
    inside = torch.tensor(6.0).sigmoid()
    expected = torch.stack([inside, torch.tensor([0.13, 0.1, 0.1]).div(0.01).softmax(0)[0] * inside])
    torch.testing.assert_close(result.scores, expected, rtol=1e-5, atol=1e-5)
    assert result.pred_masks[0].tolist() == [[bool(x) for x in row] for row in LEFT]
    assert result.pred_boxes.tensor.tolist() == [[0, 0, 2, 3], [2, 0, 4, 3]]
    zeros = instances([2, 0], [LEFT, RIGHT], boxes_from_masks=False)
    assert zeros.pred_boxes.tensor.eq(0).all() and len(zeros) == 2


def test_a_group_is_dropped_only_where_its_own_class_covers_it():
    assert len(instances([2, 2, 2], [LEFT, RIGHT, WHOLE])) == 2
    assert sorted(instances([0, 0, 2], [LEFT, RIGHT, CORNER]).pred_classes.tolist()) == [0, 0]
    # Others of the class cover half of the largest: no group.
    assert len(instances([2, 2], [LEFT, WHOLE])) == 2
    # Masks of another class cover all of it: no group either.
    weak = torch.cat([rows_of([0, 0], score=0.5), rows_of([2], score=0.9)])
    assert instances(None, [LEFT, RIGHT, WHOLE], weak, overlap_threshold=-1.0).pred_classes.tolist().count(2) == 1


def test_equal_masks_of_a_class_leave_one():
    assert len(instances([2, 2], [LEFT, LEFT])) == 1


@pytest.mark.parametrize("masks", [torch.zeros(2, 3, 4), torch.zeros(0, 3, 4)])
def test_nothing_found(masks):
    labels = [0, 2][: len(masks)]
    ids, segments = panoptic(labels, masks)
    assert ids.shape == (3, 4) and ids.eq(0).all() and segments == []
    result = instances(labels, masks)
    assert len(result) == 0 and result.pred_masks.shape == (0, 3, 4)


def test_one_class():
    probs = torch.full((2, 1), 0.3)
    ids, segments = freeseg_panoptic_inference(
        probs, logits_of([LEFT, RIGHT]), is_thing=torch.tensor([True]), **THRESHOLDS
    )
    assert ids.tolist() == [[1, 1, 2, 2]] * 3 and len(segments) == 2


def test_instances_of_the_public_code_are_among_ours():
    case = load_case(GOLDENS, Path(GOLDENS) / "maft/freeseg_panoptic_instance/a")
    x = case.inputs
    scores = HostEnsemble(name="zsseg", weight=case.meta["lambda"])(
        x["clip_logits"][None, :, :-1], x["seen_flag"] > 0.5, proposal_logits=x["mask_cls_logits"][None]
    )[0]
    is_thing = torch.isin(torch.arange(scores.shape[1]), torch.tensor(case.meta["thing_classes"]))
    result = freeseg_instance_inference(scores, x["mask_logits"], is_thing=is_thing, **THRESHOLDS)
    found = 0
    for mask, score, label in zip(
        *(case.expected[f"inst_{name}"] for name in ("masks", "scores", "classes")), strict=True
    ):
        for i in range(len(result)):
            if torch.equal(result.pred_masks[i], mask.bool()):
                torch.testing.assert_close(result.scores[i], score)
                assert result.pred_classes[i] == label
                found += 1
    # The public code takes the third, of another class, for a group of these.
    assert found == 2 and result.pred_classes.tolist() == [2, 3, 3]


def make_inference(**kwargs):
    return MaskInference(
        tasks=MaskInference.TASKS,
        postprocess_before_inference=False,
        top_k=5,
        boxes_from_masks=True,
        **THRESHOLDS,
        **kwargs,
    )


def test_mask_inference_merges_as_it_is_told():
    # The first mask is unclear about its class: below mask2former's threshold, clear to FreeSeg's sharpened scores.
    class_probs = torch.cat([torch.tensor([[0.4, 0.1, 0.1], [0.1, 0.1, 0.9]]), torch.zeros(2, 1)], dim=1)
    sizes = {"padded_size": (3, 4), "image_size": (3, 4), "output_size": (3, 4)}
    results = {
        merge: make_inference(merge=merge)(class_probs, logits_of([LEFT, RIGHT]), is_thing=IS_THING, **sizes)
        for merge in MaskInference.MERGES
    }
    assert results["freeseg"]["panoptic_seg"][0].tolist() == [[1, 1, 2, 2]] * 3
    assert results["mask2former"]["panoptic_seg"][0].tolist() == [[0, 0, 1, 1]] * 3
    assert len(results["freeseg"]["instances"]) == 2 and len(results["mask2former"]["instances"]) > 2
    torch.testing.assert_close(results["freeseg"]["sem_seg"], results["mask2former"]["sem_seg"])
    with pytest.raises(ValueError, match="MODEL.OVSEG.TEST.MERGE is 'max'; allowed are mask2former, freeseg"):
        make_inference(merge="max")
