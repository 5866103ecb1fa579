"""FGA-seg as a whole: a training step, the whole image and windows, from an official state dict."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.nn import functional as F

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.inference.sliding_window import SlidingWindow
from ovseg_d2.structures import SegmentationTargets, Vocabulary
from tests.parity import Case

#: Recorded gradients and the parameters that they are of.
GRADIENTS = {
    "q_proj0": "clip.visual.tower.transformer.resblocks.0.attn.q_proj_weight",
    "text_v_proj0": "clip.text.transformer.resblocks.0.attn.v_proj_weight",
    "gamma": "text_alignment.residual_scale",
    "lcs_txt_bias": "cost_head.similarity.text_kernels.bias",
}


def full_model(case: Case) -> dict[str, Any]:
    x, meta = case.inputs, case.meta
    model = build(meta)
    state, _ = convert_state_dict(case.params)
    model.load_state_dict(state)
    tokens = x["tokens"].long()
    model.text_classifier.tokenizer = lambda texts: tokens
    vocabulary = Vocabulary(names=tuple(f"class {i}" for i in range(len(tokens))), is_thing=(False,) * len(tokens))
    results = training_step(model.train(), case, vocabulary)
    model.load_state_dict(state)
    return results | evaluation(model.eval(), case, vocabulary)


def build(meta: dict[str, Any]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        clip_file = Path(folder) / "clip.json"
        clip_file.write_text(json.dumps(clip_config(meta["constructor"]["clipkw"])))
        return build_model(config(meta, str(clip_file)))


def clip_config(ctor: dict[str, int]) -> dict[str, Any]:
    return {
        "embed_dim": ctor["embed"],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": ctor["res"],
            "patch_size": ctor["patch"],
            "width": ctor["width"],
            "layers": ctor["layers"],
            "head_width": ctor["width"] // ctor["heads"],
        },
        "text_cfg": {
            "context_length": ctor["ctx"],
            "vocab_size": ctor["vocab"],
            "width": ctor["twidth"],
            "heads": ctor["theads"],
            "layers": ctor["tlayers"],
        },
    }


def config(meta: dict[str, Any], clip_name: str) -> CfgNode:
    ctor = meta["constructor"]
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "FGASeg"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = meta["clip_pixel_mean"], meta["clip_pixel_std"]
    cfg.DATASETS.TRAIN = ()
    cfg.INPUT.FORMAT = "RGB"
    ovseg = cfg.MODEL.OVSEG
    ovseg.SIZE_DIVISIBILITY = meta["size_divisibility"]
    ovseg.CLIP.NAME = clip_name
    ovseg.CLIP.RESIZE, ovseg.CLIP.INPUT_SIZE = "padded_square", meta["clip_resolution"][0]
    ovseg.CLIP.TRAINABLE = ovseg.TEXT.TRAINABLE = "attention_qv"
    ovseg.TEXT.TEMPLATES = ["A photo of a {} in the scene"]
    fga = ovseg.FGA_SEG
    fga.GUIDANCE_LAYERS = meta["layer_indexes"]
    fga.P2T_LAYERS, fga.KERNEL_SIZE = ctor["P2T_layer"], ctor["K"]
    fga.ALIGN_WEIGHT = meta["lambda_align"]
    fga.AUX_WEIGHTS = [meta["lambda_auxi"], 1.0, 1.0]
    fga.FUSION, fga.FAST, fga.TOP_K = ctor["fusion"], ctor["mode"] == "fast", ctor["topk"] or 0
    fga.HIDDEN_DIM, fga.LAYERS, fga.HEADS = ctor["hidden"], ctor["layers"], ctor["heads"]
    fga.WINDOW_SIZE = ctor["window"]
    fga.POOLING = fga.TEST_POOLING = ctor["pool"][0]
    fga.GUIDANCE_DIM, fga.TEXT_GUIDANCE_DIM = ctor["app"], ctor["tgp"]
    fga.DECODER_DIMS, fga.DECODER_GUIDANCE_DIMS = ctor["ddims"], ctor["dgd"]
    fga.DECODER_GUIDANCE_PROJ_DIMS = ctor["dgp"]
    return cfg


def training_step(model: nn.Module, case: Case, vocabulary: Vocabulary) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def record(name: str, module: nn.Module, change: Any) -> Any:
        return module.register_forward_hook(lambda _module, _args, out: results.__setitem__(name, change(out)))

    hooks = [
        record("train.text_embeddings", model.text_alignment, lambda text: text[:, :, 0].transpose(0, 1)),
        record("train.res4_sub", model.guidance[0], lambda y: y[:, :, ::7, ::7]),
        record("train.res5_sub", model.guidance[1], lambda y: y[:, :, ::13, ::13]),
        record("train.align_sub", model.text_projection, lambda y: y[:, :, ::5, ::5]),
    ]
    images = model.preprocess([{"image": image} for image in case.inputs["train_images"]])
    targets = [class_masks(labels, len(vocabulary)) for labels in case.inputs["train_targets"].long()]
    losses = model.losses(images, targets, vocabulary)
    total = sum(losses.values())
    total.backward()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        states = model.clip.visual.token_states(model.clip_frame.clip_copy(images).tensor)
        results["train.clip_dense"] = model.clip.visual.head(states.dense)
    results |= {"train.loss": total, "train.loss_ce": losses["loss_sem_seg"]}
    results["train.loss_align"] = losses["loss_align"] / model.align_weight
    for i, weight in enumerate(model.aux_weights):
        if f"loss_aux_{i}" in losses:
            results[f"train.loss_aux{i}"] = losses[f"loss_aux_{i}"] / weight
    parameters = dict(model.named_parameters())
    results |= {f"train.grad.{name}": parameters[ours].grad for name, ours in GRADIENTS.items()}
    return results


def class_masks(labels: Tensor, num_classes: int) -> SegmentationTargets:
    """Labels (H, W) -> a mask a class that is there; what is no class is in none."""
    class_ids = torch.arange(num_classes)
    masks = labels == class_ids[:, None, None]
    present = masks.flatten(1).any(dim=1)
    return SegmentationTargets(class_ids[present], masks[present])


@torch.no_grad()
def evaluation(model: nn.Module, case: Case, vocabulary: Vocabulary) -> dict[str, Any]:
    image, sliding = case.inputs["eval_image"], case.meta["sliding"]
    height, width = case.meta["shapes"]["out/eval.sem_seg"][1:]
    batch = [{"image": image, "height": height, "width": width, "vocabulary": vocabulary}]
    # The public code leaves the padding of the image in its result; ours is cut, so that this is done here.
    scores = model.scores(model.predict(model.preprocess(batch), vocabulary).mask_logits)
    results = {"eval.sem_seg": F.interpolate(scores, size=(height, width), mode="bilinear")[0]}
    model.sliding_window = SlidingWindow(
        size=sliding["kernel"],
        stride=sliding["stride"],
        image_size=sliding["out_res"][0],
        whole_image=True,
        batch_size=3,
    )
    return results | {"slide.sem_seg": model(batch)[0]["sem_seg"]}


TOPICS = {"fgaseg/full_model": full_model}
