"""Mask2Former's parts: attention, position encoding, pixel decoder, mask decoder."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ovseg_d2.modeling.layers.ms_deform_attn import MSDeformAttn, deformable_sampling
from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding
from ovseg_d2.modeling.proposals.class_heads import LinearClassHead
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder, blocked_positions
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from tests.parity import Case, Unsupported
from tests.parity_families.recorded import load_params


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
    ).train()  # for the predictions of earlier layers; nothing in it is random
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


TOPICS = {
    "mask2former/msdeformattn": msdeformattn,
    "mask2former/position_encoding": position_encoding,
    "mask2former/pixel_decoder": pixel_decoder,
    "mask2former/transformer_decoder": transformer_decoder,
}
