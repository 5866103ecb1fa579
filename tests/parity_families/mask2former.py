"""Mask2Former: layers, pixel decoder, mask decoder, matcher, criterion, inference and the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.layers.ms_deform_attn import MSDeformAttn, deformable_sampling
from ovseg_d2.modeling.layers.point_sampling import sample_points, uncertain_points
from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding
from ovseg_d2.modeling.losses.mask_losses import PointMaskLoss
from ovseg_d2.modeling.losses.matcher import HungarianMatcher
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.modeling.meta_arch.mask2former import Mask2Former
from ovseg_d2.modeling.proposals.class_heads import LinearClassHead
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder, blocked_positions
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.structures import MaskProposals, SegmentationTargets, Vocabulary
from tests.parity import Case, Unsupported

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class RecordedDraws:
    """A point sampler that hands out recorded uniform draws in their order."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = [draw for draw in draws if len(draw)]

    def start(self, image_ids: Sequence[int | str], device: torch.device) -> RecordedDraws:
        return self

    def __call__(self, counts: Sequence[int], num_points: int) -> Tensor:
        rows: list[Tensor] = []
        while sum(len(row) for row in rows) < sum(counts):
            rows.append(self.draws.pop(0))
        result = torch.cat(rows) if rows else torch.zeros(0, num_points, 2)
        assert result.shape == (sum(counts), num_points, 2), (result.shape, counts, num_points)
        return result


def load_params(module: nn.Module, params: dict[str, Tensor], *, official: str, ours: str) -> None:
    """Load weights by the road of real checkpoints, under the prefixes the module has in the whole model."""
    renamed, _ = convert_state_dict({official + key: value for key, value in params.items()})
    assert all(key.startswith(ours) for key in renamed), sorted(renamed)
    module.load_state_dict({key.removeprefix(ours): value for key, value in renamed.items()}, strict=True)


def msdeformattn(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["constructor"], case.inputs
    module = MSDeformAttn(
        dim=ctor["d_model"], num_levels=ctor["n_levels"], num_heads=ctor["n_heads"], num_points=ctor["n_points"]
    )
    place = "transformer.encoder.layers.0.self_attn."
    load_params(
        module,
        case.params,
        official=f"sem_seg_head.pixel_decoder.{place}",
        ours=f"proposals.pixel_decoder.{place.removeprefix('transformer.').replace('encoder.layers', 'encoder')}",
    )
    shapes = [(int(h), int(w)) for h, w in x["spatial_shapes"]]
    args = (x["query"], x["reference_points"], x["input_flatten"], shapes, x.get("input_padding_mask"))
    with torch.no_grad():
        output = module(*args)
        core_inputs = module.sampling_inputs(*args)
    value, locations, weights = (tensor.requires_grad_() for tensor in core_inputs)
    core = deformable_sampling(value, shapes, locations, weights)
    core.backward(x["core_grad_output"])
    sizes = torch.tensor([h * w for h, w in shapes])
    return {
        "output": output,
        "level_start_index": sizes.cumsum(0) - sizes,
        "core_value": value,
        "core_sampling_locations": locations,
        "core_attention_weights": weights,
        "core_output": core,
        "core_grad_value": value.grad,
        "core_grad_sampling_locations": locations.grad,
        "core_grad_attention_weights": weights.grad,
    }


def position_encoding(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    if not ctor["normalize"]:
        raise Unsupported("normalize=False")
    module = SinePositionEncoding(dim=2 * ctor["num_pos_feats"], temperature=ctor["temperature"], scale=ctor["scale"])
    pos = module(case.inputs["x"], case.inputs.get("mask"))
    return {"pos": pos.expand(len(case.inputs["x"]), -1, -1, -1)}


@torch.no_grad()
def pixel_decoder(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    module = MSDeformAttnPixelDecoder(
        input_shape={name: ShapeSpec(channels=c, stride=s) for name, (c, s) in ctor["input_shape"].items()},
        encoder_features=ctor["transformer_in_features"],
        dim=ctor["conv_dim"],
        mask_dim=ctor["mask_dim"],
        ffn_dim=ctor["transformer_dim_feedforward"],
        num_layers=ctor["transformer_enc_layers"],
        num_heads=ctor["transformer_nheads"],
        dropout=ctor["transformer_dropout"],
        norm=ctor["norm"],
        common_stride=ctor["common_stride"],
    ).eval()
    load_params(module, case.params, official="sem_seg_head.pixel_decoder.", ours="proposals.pixel_decoder.")
    layer_outputs: list[Tensor] = []
    for layer in module.encoder:
        layer.register_forward_hook(lambda _module, _args, output: layer_outputs.append(output))
    features = module(case.inputs)
    src, pos, reference, _ = module.encoder_inputs([case.inputs[name] for name in module.encoder_features])
    n = len(src)
    return {
        "mask_features": features.mask_features,
        "transformer_encoder_features": features.multi_scale[0],
        **{f"multi_scale_features_{i}": feature for i, feature in enumerate(features.multi_scale)},
        "encoder_src": src,
        "encoder_lvl_pos_embed": pos.expand(n, -1, -1),
        "encoder_reference_points": reference.expand(n, -1, -1, -1),
        "encoder_layer0": layer_outputs[0],
        "encoder_memory": layer_outputs[-1],
    }


@torch.no_grad()
def transformer_decoder(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    features = case.indexed("x_{}")
    module = MaskedAttentionDecoder(
        in_dim=ctor["in_channels"],
        dim=ctor["hidden_dim"],
        mask_dim=ctor["mask_dim"],
        class_head=LinearClassHead(dim=ctor["hidden_dim"], num_classes=ctor["num_classes"]),
        num_queries=ctor["num_queries"],
        num_heads=ctor["nheads"],
        ffn_dim=ctor["dim_feedforward"],
        num_layers=ctor["dec_layers"],
        num_scales=len(features),
        pre_norm=ctor["pre_norm"],
        enforce_input_proj=ctor["enforce_input_project"],
    ).eval()
    load_params(module, case.params, official="sem_seg_head.predictor.", ours="proposals.mask_decoder.")
    used, layer_outputs = [], []

    def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        used.append(args[-1])
        layer_outputs.append(output)

    for layer in module.layers:
        layer.register_forward_hook(record)
    last = module(features, case.inputs["mask_features"])
    outputs = {"pred_logits": last.class_logits, "pred_masks": last.mask_logits}
    for i, prediction in enumerate([*last.aux, last]):
        size = features[i % len(features)].shape[-2:]
        outputs[f"attn_mask_raw_{i}"] = blocked_positions(prediction.mask_logits, tuple(size))
        if prediction is not last:
            outputs[f"aux_{i}/pred_logits"] = prediction.class_logits
            outputs[f"aux_{i}/pred_masks"] = prediction.mask_logits
    outputs |= {f"attn_mask_used_{i}": mask for i, mask in enumerate(used)}
    outputs |= {f"layer_output_{i}": output for i, output in enumerate(layer_outputs)}
    return outputs


def point_sampling(case: Case) -> dict[str, Any]:
    ctor, logits = case.meta["constructor"], case.inputs["logits"]
    points = uncertain_points(
        logits,
        RecordedDraws(case.indexed("rand_{}")),
        [len(logits)],
        num_points=ctor["num_points"],
        oversample_ratio=ctor["oversample_ratio"],
        importance_ratio=ctor["importance_sample_ratio"],
    )
    return {
        "point_coords": points,
        "sampled_logits": sample_points(logits, points),
        "sampled_labels": sample_points(case.inputs["labels"], points),
    }


def recorded_targets(case: Case, labels: str = "target_labels_{}", masks: str = "target_masks_{}") -> list[Any]:
    return [
        SegmentationTargets(class_ids.long(), image_masks.bool())
        for class_ids, image_masks in zip(case.indexed(labels), case.indexed(masks), strict=True)
    ]


def matcher(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    module = HungarianMatcher(
        class_weight=ctor["cost_class"],
        mask_weight=ctor["cost_mask"],
        dice_weight=ctor["cost_dice"],
        mask_loss=PointMaskLoss(num_points=ctor["num_points"]),
    )
    proposals = MaskProposals(class_logits=case.inputs["pred_logits"], mask_logits=case.inputs["pred_masks"])
    targets, points = recorded_targets(case), case.indexed("point_coords_{}")
    outputs = {}
    for i, costs in enumerate(module.costs(proposals, targets, RecordedDraws(points))):
        outputs[f"cost_class_{i}"] = costs.class_cost
        outputs[f"cost_mask_{i}"] = costs.mask_cost
        outputs[f"cost_dice_{i}"] = costs.dice_cost
        outputs[f"cost_total_{i}"] = module.total_cost(costs)
    for i, (queries, matched) in enumerate(module(proposals, targets, RecordedDraws(points))):
        outputs[f"src_idx_{i}"], outputs[f"tgt_idx_{i}"] = queries, matched
    return outputs


def criterion(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    weights = ctor["weights"]
    mask_loss = PointMaskLoss(
        num_points=ctor["num_points"],
        oversample_ratio=ctor["oversample_ratio"],
        importance_ratio=ctor["importance_sample_ratio"],
    )
    module = SetCriterion(
        num_classes=ctor["num_classes"],
        class_weight=weights["loss_ce"],
        mask_weight=weights["loss_mask"],
        dice_weight=weights["loss_dice"],
        no_object_weight=ctor["eos_coef"],
        mask_loss=mask_loss,
        sampler=RecordedDraws(case.indexed("rand_{:02d}")),
    )
    matches: list[Any] = []
    module.matcher.register_forward_hook(lambda _module, _args, output: matches.append(output))
    points: list[Tensor] = []
    mask_loss.loss_points = recording(mask_loss.loss_points, points)

    names = ["final"]
    while f"aux_{len(names) - 1}/pred_logits" in case.inputs:
        names.append(f"aux_{len(names) - 1}")
    leaves = {key: case.inputs[key].clone().requires_grad_() for key in case.inputs if "pred_" in key}
    final, *aux = (
        MaskProposals(class_logits=leaves[f"{prefix}pred_logits"], mask_logits=leaves[f"{prefix}pred_masks"])
        for prefix in ("" if name == "final" else f"{name}/" for name in names)
    )
    final.aux = aux
    losses = module(final, recorded_targets(case), ["first", "second"])
    total = sum(losses.values())
    total.backward()
    outputs = {
        **{f"loss/{name}": loss / weights["_".join(name.split("_")[:2])] for name, loss in losses.items()},
        **{f"grad/{name}": leaf.grad for name, leaf in leaves.items()},
        "total_weighted": total,
    }
    for name, image_matches, coordinates in zip(names, matches, points, strict=True):
        outputs[f"point_coords/{name}"] = coordinates
        for i, (queries, matched) in enumerate(image_matches):
            outputs[f"match/{name}/src_{i}"], outputs[f"match/{name}/tgt_{i}"] = queries, matched
    return outputs


def recording(function: Callable[..., Tensor], calls: list[Tensor]) -> Callable[..., Tensor]:
    """``function``, whose results are also put into ``calls``."""

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(function(*args, **kwargs))
        return calls[-1]

    return record


def numbered_vocabulary(num_classes: int, thing_ids: Sequence[int]) -> Vocabulary:
    names = tuple(f"class {i}" for i in range(num_classes))
    return Vocabulary(names=names, is_thing=tuple(i in thing_ids for i in range(num_classes)))


def result_outputs(results: list[dict[str, Any]]) -> dict[str, Any]:
    """detectron2's results under the names of the recorded outputs."""
    outputs: dict[str, Any] = {}
    for i, result in enumerate(results):
        if "sem_seg" in result:
            outputs[f"sem_seg_{i}"] = result["sem_seg"]
        if "panoptic_seg" in result:
            outputs[f"panoptic_seg_{i}"] = result["panoptic_seg"][0]
        if "instances" in result:
            instances = result["instances"]
            outputs[f"instance_scores_{i}"] = instances.scores
            outputs[f"instance_classes_{i}"] = instances.pred_classes
            outputs[f"instance_masks_{i}"] = instances.pred_masks
            outputs[f"instance_boxes_{i}"] = instances.pred_boxes.tensor
    outputs["segments_info"] = [result["panoptic_seg"][1] for result in results if "panoptic_seg" in result]
    return outputs


class FixedProposals(nn.Module):
    """Stands for a generator: the same proposals whatever the images."""

    def __init__(self, proposals: MaskProposals) -> None:
        super().__init__()
        self.proposals = proposals

    def forward(self, images: Any, features: Any = None, text: Any = None) -> MaskProposals:
        return self.proposals


@torch.no_grad()
def inference(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    tasks = [task for task in MaskInference.TASKS if ctor[f"{task}_on"]]
    proposals = MaskProposals(class_logits=case.inputs["pred_logits"], mask_logits=case.inputs["pred_masks"])
    vocabulary = numbered_vocabulary(ctor["num_classes"], ctor["thing_contiguous_ids"])
    model = Mask2Former(
        proposals=FixedProposals(proposals),
        criterion=SetCriterion(
            num_classes=ctor["num_classes"],
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=5.0,
            no_object_weight=0.1,
            mask_loss=PointMaskLoss(num_points=32),
        ),
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
    "mask2former/msdeformattn": msdeformattn,
    "mask2former/position_encoding": position_encoding,
    "mask2former/pixel_decoder": pixel_decoder,
    "mask2former/transformer_decoder": transformer_decoder,
    "mask2former/point_sampling": point_sampling,
    "mask2former/matcher": matcher,
    "mask2former/criterion": criterion,
    "mask2former/inference": inference,
    "mask2former/full_model": full_model,
}
