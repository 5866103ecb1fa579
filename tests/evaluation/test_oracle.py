"""Upper bounds of masks: the ground truth names them."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from ovseg_d2.engine.load_config import load_config
from ovseg_d2.evaluation import OracleEvaluator, build_evaluator
from ovseg_d2.evaluation.oracle import oracle_sem_seg
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from tests.evaluation.panoptic_files import CAT, DOG, GRASS, make_dataset, painted, sem_seg_output
from tests.evaluation.test_build import config

PANOPTIC = painted("1123 1103 4433")
CLASSES = {1: CAT, 2: GRASS, 3: CAT, 4: DOG}
LABELS = np.array([[CAT, CAT, GRASS, CAT], [CAT, CAT, 255, CAT], [DOG, DOG, CAT, CAT]])


@pytest.fixture
def dataset(tmp_path):
    dataset = make_dataset(tmp_path, [(PANOPTIC, CLASSES)])
    MetadataCatalog.get(dataset.name).set(class_is_seen=[True, True, False])
    return dataset


def scores(dataset, masks: torch.Tensor) -> dict[str, float]:
    evaluator = OracleEvaluator(dataset_name=dataset.name)
    evaluator.process(dataset.inputs, [{"mask_probs": masks}])
    return evaluator.evaluate()["sem_seg_oracle"]


def stacked(*texts: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([painted(text) for text in texts])).float()


PERFECT = stacked("1100 1100 0000", "0001 0001 0011", "0010 0000 0000", "0000 0000 1100")


@pytest.mark.parametrize("extra", [0, 3])
def test_perfect_masks_score_100(dataset, extra):
    found = scores(dataset, torch.cat([PERFECT, torch.zeros(extra, 3, 4)]))
    assert {key: found[key] for key in ("mIoU", "mIoU_seen", "mIoU_unseen", "hIoU", "pACC")} == dict.fromkeys(
        ("mIoU", "mIoU_seen", "mIoU_unseen", "hIoU", "pACC"), 100
    )


@pytest.mark.parametrize("masks", [torch.zeros(0, 3, 4), torch.zeros(2, 3, 4)])
def test_no_masks_score_0(dataset, masks):
    found = scores(dataset, masks)
    assert not any(np.isnan(value) for value in found.values())
    # Not even class 0 is right, which an argmax over nothing would be.
    assert set(found.values()) == {0}


def test_nothing_is_labelled(tmp_path):
    dataset = make_dataset(tmp_path, [(np.zeros((3, 4), int), {})])
    assert np.isnan(scores(dataset, PERFECT)["mIoU"])


def test_by_hand(dataset):
    # The first mask has IoU 2 / 9 with cat (2 of its 8 pixels, 3 in all), 1 / 3 with dog: 1 of 2 pixels, 2 more.
    masks = stacked("1100 0000 1000", "0010 0010 0000")
    masks[0, 1, 0] = 0.4  # not above one half, so in no IoU, but in the sum
    labels = torch.from_numpy(LABELS)
    found = oracle_sem_seg(masks, labels, torch.tensor([GRASS, CAT, DOG]))
    ious = torch.tensor([[0, 2 / 9, 1 / 4], [1, 0, 0]])  # the pixel without a label does not count
    torch.testing.assert_close(found, torch.einsum("qm,qhw->mhw", ious, masks))
    result = scores(dataset, masks)
    # Three pixels and the one of 0.4 become dog, of which one is right; grass is right.
    assert result["IoU-dog"] == pytest.approx(100 * 1 / (2 + 4 - 1))
    assert (result["IoU-grass"], result["IoU-cat"]) == (100, 0)
    assert result["mIoU_seen"] == 50 and result["mIoU_unseen"] == pytest.approx(20)
    assert result["hIoU"] == pytest.approx(2 * 50 * 20 / 70)


def test_soft_masks_of_a_model(dataset):
    """With the classes of the truth as its own, a model's semantic result is the oracle's."""
    inference = MaskInference(
        tasks=["semantic"],
        object_mask_threshold=0,
        overlap_threshold=0,
        postprocess_before_inference=False,
        top_k=1,
        boxes_from_masks=True,
        return_masks=True,
    )
    logits = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.from_numpy(LABELS)
    frame = {"padded_size": (32, 32), "image_size": (24, 30), "output_size": (3, 4), "is_thing": torch.ones(3)}
    probs = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    for resize_first in (False, True):
        inference.resize_first = resize_first
        found = inference(probs, logits, **frame)
        torch.testing.assert_close(found["sem_seg"], torch.einsum("qk,qhw->khw", probs[:, :-1], found["mask_probs"]))
        assert oracle_sem_seg(found["mask_probs"], labels, torch.arange(3)).shape == (3, 3, 4)
    inference.return_masks = False
    assert "mask_probs" not in inference(probs, logits, **frame)


def test_bad_input(dataset):
    with pytest.raises(ValueError, match=r"0.png: ground truth is \(3, 4\), the prediction \(4, 3\)"):
        scores(dataset, PERFECT.transpose(1, 2))
    with pytest.raises(ValueError, match=r"OracleEvaluator needs model output 'mask_probs', found \['sem_seg'\]"):
        OracleEvaluator(dataset_name=dataset.name).process(dataset.inputs, [sem_seg_output(np.zeros((3, 4), int))])


def test_the_key(dataset):
    evaluators = build_evaluator(config("semantic", "panoptic", oracle="iou"), dataset.name)._evaluators
    assert [type(e).__name__ for e in evaluators] == ["SemSegEvaluator", "PanopticEvaluator", "OracleEvaluator"]
    with pytest.raises(ValueError, match=r"TEST.ORACLE is 'iou', which is of semantic results; .* is \['panoptic'\]"):
        build_evaluator(config("panoptic", oracle="iou"), dataset.name)
    with pytest.raises(ValueError, match=r"MODEL.OVSEG.TEST.ORACLE is 'IoU', allowed are '', iou"):
        load_config("", ["MODEL.OVSEG.TEST.ORACLE", "IoU"])
