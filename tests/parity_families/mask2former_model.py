"""Mask2Former as a whole: inference, and the model of each public config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Instances

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.meta_arch.mask2former import Mask2Former
from ovseg_d2.structures import MaskProposals, Vocabulary
from tests.parity import Case, Unsupported
from tests.parity_families.recorded import (
    FixedProposals,
    RecordedDraws,
    idle_criterion,
    load_params,
    recorded_targets,
    result_outputs,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OFFICIAL_CONFIGS = {
    "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml": "ade20k_semantic_R50.yaml",
    "ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k.yaml": "ade20k_panoptic_R50.yaml",
    "ade20k/instance-segmentation/maskformer2_R50_bs16_160k.yaml": "ade20k_instance_R50.yaml",
    "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml": "coco_panoptic_R50.yaml",
    "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml": "coco_instance_R50.yaml",
    "cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k.yaml": "cityscapes_semantic_R50.yaml",
    "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml": "cityscapes_panoptic_R50.yaml",
    "cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml": "cityscapes_instance_R50.yaml",
}
OFFICIAL_KEYS = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": "MODEL.OVSEG.PROPOSALS.PIXEL_DIM",
    "MODEL.SEM_SEG_HEAD.MASK_DIM": "MODEL.OVSEG.PROPOSALS.MASK_DIM",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": "MODEL.OVSEG.PROPOSALS.ENC_LAYERS",
    "MODEL.MASK_FORMER.HIDDEN_DIM": "MODEL.OVSEG.PROPOSALS.HIDDEN_DIM",
    "MODEL.MASK_FORMER.NHEADS": "MODEL.OVSEG.PROPOSALS.NUM_HEADS",
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": "MODEL.OVSEG.PROPOSALS.DEC_FFN_DIM",
    "MODEL.MASK_FORMER.DEC_LAYERS": "MODEL.OVSEG.PROPOSALS.DEC_LAYERS",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": "MODEL.OVSEG.PROPOSALS.NUM_QUERIES",
    "MODEL.MASK_FORMER.PRE_NORM": "MODEL.OVSEG.PROPOSALS.PRE_NORM",
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": "MODEL.OVSEG.PROPOSALS.ENFORCE_INPUT_PROJ",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": "MODEL.OVSEG.LOSS.NUM_POINTS",
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": "MODEL.OVSEG.TEST.OBJECT_MASK_THRESHOLD",
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": "MODEL.OVSEG.TEST.OVERLAP_THRESHOLD",
}


def numbered_vocabulary(num_classes: int, thing_ids: Sequence[int]) -> Vocabulary:
    names = tuple(f"class {i}" for i in range(num_classes))
    return Vocabulary(names=names, is_thing=tuple(i in thing_ids for i in range(num_classes)))


@torch.no_grad()
def inference(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    tasks = [task for task in MaskInference.TASKS if ctor[f"{task}_on"]]
    proposals = MaskProposals(class_logits=case.inputs["pred_logits"], mask_logits=case.inputs["pred_masks"])
    vocabulary = numbered_vocabulary(ctor["num_classes"], ctor["thing_contiguous_ids"])
    model = Mask2Former(
        proposals=FixedProposals(proposals),
        criterion=idle_criterion(ctor["num_classes"]),
        pixel_mean=ctor["pixel_mean"],
        pixel_std=ctor["pixel_std"],
        size_divisibility=ctor["size_divisibility"],
        inference=MaskInference(
            tasks=tasks,
            object_mask_threshold=ctor["object_mask_threshold"],
            overlap_threshold=ctor["overlap_threshold"],
            postprocess_before_inference=ctor["sem_seg_postprocess_before_inference"],
            top_k=ctor["test_topk_per_image"],
            boxes_from_masks=False,
        ),
        vocabulary=vocabulary,
    ).eval()
    output_sizes = case.meta["output_sizes_height_width"]
    batch = [
        {"image": image, "height": height, "width": width}
        for image, (height, width) in zip(case.indexed("image_{}"), output_sizes, strict=True)
    ]
    images = model.preprocess(batch)
    outputs = {"normalised_padded_images": images.tensor, **result_outputs(model(batch))}
    for i, size in enumerate(output_sizes):
        outputs[f"mask_pred_used_{i}"] = model.inference.resize(
            case.inputs["pred_masks"][i],
            padded_size=images.padded_size,
            image_size=images.image_sizes[i],
            output_size=tuple(size),
        )
    return outputs


def full_model(case: Case) -> dict[str, Any]:
    if case.meta["config_file"] not in OFFICIAL_CONFIGS:
        raise Unsupported(f"config_file {case.meta['config_file']}")
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "mask2former" / OFFICIAL_CONFIGS[case.meta["config_file"]]))
    overrides = case.meta["config_overrides"]
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        if key == "MODEL.MASK_FORMER.DEC_LAYERS":
            value -= 1  # the public key counts the prediction before the first layer
        if key.startswith("MODEL.MASK_FORMER.") and key not in OFFICIAL_KEYS:
            raise Unsupported(f"config key {key}")
        cfg.merge_from_list([OFFICIAL_KEYS.get(key, key), value])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.OVSEG.TEST.BOXES_FROM_MASKS = False
    model = build_model(cfg).eval()
    load_params(model, case.params, official="", ours="")

    vocabulary = numbered_vocabulary(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, case.meta["thing_contiguous_ids"])
    batch = [
        {"image": image, "height": height, "width": width, "vocabulary": vocabulary}
        for image, (height, width) in zip(case.indexed("image_{}"), case.meta["output_sizes_height_width"], strict=True)
    ]
    with torch.no_grad():
        images = model.preprocess(batch)
        features = model.proposals.backbone(images.tensor)
        proposals = model.predict(images, vocabulary)
        outputs = {
            **{f"backbone/{name}": feature for name, feature in features.items()},
            "pred_logits": proposals.class_logits,
            "pred_masks": proposals.mask_logits,
            **result_outputs(model(batch)),
        }
    if "gt_classes_0" in case.inputs:
        targets = recorded_targets(case, "gt_classes_{}", "gt_masks_{}")
        for x, target in zip(batch, targets, strict=True):
            x["instances"] = Instances(tuple(x["image"].shape[-2:]), gt_classes=target.class_ids, gt_masks=target.masks)
        model.criterion.sampler = RecordedDraws(case.indexed("rand_{:02d}"))
        outputs |= {f"loss/{name}": loss for name, loss in model.train()(batch).items()}
    return outputs


TOPICS = {
    "mask2former/inference": inference,
    "mask2former/full_model": full_model,
}
