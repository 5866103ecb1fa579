"""MaskCLIP++: similarities, classification loss, a whole training step."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.checkpoint.key_maps import MASKCLIPPP
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.eva import ClipEva, timm_names_from_eva_clip
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, ClipImageEncoder
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.losses.mask_classification import MaskClassificationLoss
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder
from ovseg_d2.modeling.mask_classification.parameterized_similarity import LinearSimilarity, PseudoTextSimilarity
from ovseg_d2.modeling.meta_arch.maskclippp import MaskCLIPpp
from ovseg_d2.structures import TextClasses, Vocabulary
from tests.parity import Case, Unsupported
from tests.parity_families.clip_conv import convnext
from tests.parity_families.clip_vit import eva_tower, without


def text_of(embeds: Tensor) -> TextClasses:
    every = torch.ones(len(embeds), dtype=torch.bool)
    return TextClasses(embeds, torch.arange(len(embeds)), every, every)


def weights_of(case: Case) -> dict[str, Tensor]:
    prefix = "" if any(name.startswith("psm.") for name in case.params) else "psm."
    renamed = {MASKCLIPPP.rename(prefix + name): tensor for name, tensor in case.params.items()}
    return {name.removeprefix("similarity."): tensor for name, tensor in renamed.items()}


def scale_of(case: Case, used: bool) -> Tensor | float:
    return case.inputs["logit_scale"].exp().clamp(max=100) if used else 1.0


@torch.no_grad()
def linear(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    module = LinearSimilarity(num_prompts=ctor["template_width"], width=ctor["corr_width"])
    module.load_state_dict(weights_of(case))
    text = text_of(case.inputs["t_embs"])
    scale = scale_of(case, case.meta["use_logit_scale"])
    masks = case.indexed("m_embs_{}")
    cos = [torch.einsum("qd,kpd->qkp", F.normalize(embeds, dim=-1), text.embeds) for embeds in masks]
    return {"cos": torch.cat(cos), "corrs": torch.cat([module(embeds[None], text, scale=scale)[0] for embeds in masks])}


@torch.no_grad()
def pseudo_text(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    module = PseudoTextSimilarity(
        dim=case.inputs["t_embs"].shape[-1],
        num_heads=ctor["num_heads"],
        dropout=ctor["attention_probs_dropout_prob"],
        normalise_dense=ctor["norm_visual_cond"],
        detach_dense=ctor["detach_visual_cond"],
        learn_scale=ctor["use_logit_scale"],
        residual=LinearSimilarity(num_prompts=ctor["template_width"], width=ctor["corr_width"])
        if ctor["corr_residual"]
        else None,
    ).eval()
    weights = weights_of(case)
    if ctor["corr_residual"]:  # a linear similarity, whatever the file calls it
        weights = {f"residual.{k}" if k.startswith(("expand.", "reduce.")) else k: v for k, v in weights.items()}
    module.load_state_dict(weights)
    text, dense = text_of(case.inputs["t_embs"]), case.inputs["p_embs"]
    scale = scale_of(case, case.meta["model_use_logit_scale"])
    rows = F.normalize(text.embeds.mean(dim=1), dim=-1)
    return {
        "pseudo_text": module.pseudo_text(rows, dense),
        "text_after_ln": module.text_rows(text, dense),
        "corrs": torch.cat(
            [
                module(embeds[None], text, scale=scale, dense=dense[i : i + 1])[0]
                for i, embeds in enumerate(case.indexed("m_embs_{}"))
            ]
        ),
    }


def reweighted_ce(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["ctor"], case.inputs
    logits = x["logits"].clone().requires_grad_()
    kept = x["areas"] > 0 if ctor["IGNORE_EMPTY"] else torch.ones(len(logits), dtype=torch.bool)
    module = MaskClassificationLoss(balanced=ctor["BALANCE_CLS"], temperature=ctor["TEMPERATURE"])
    loss = module(logits[kept], x["labels"].long()[kept], x["mask2batch"].long()[kept])
    loss.backward()
    return {"loss": loss, "grad_logits": logits.grad}


class RecordedText(MaskCLIPpp):
    """The class texts of a case, whatever the vocabulary."""

    rows: Tensor

    def training_text(self, vocabulary: Vocabulary) -> TextClasses:
        return text_of(self.rows)


def recorded_encoder(case: Case) -> tuple[ClipImageEncoder, dict[str, str]]:
    """The image encoder with the recorded weights, and our name of each official name in it."""
    params = without(case.params, "visual_encoder.proxy.")
    if case.meta["kind"] == "convnext":
        # Depths and widths are told in words alone; the weights have them.
        dims = [len(params[f"trunk.stages.{i}.blocks.0.gamma"]) for i in range(4)]
        depths = [len({k.split(".")[4] for k in params if k.startswith(f"trunk.stages.{i}.blocks.")}) for i in range(4)]
        linear = "head.proj.weight" in params
        encoder: ClipImageEncoder = convnext(
            depths=depths,
            dims=dims,
            embed_dim=len(params["head.proj.weight" if linear else "head.mlp.fc2.weight"]),
            proj="linear" if linear else "mlp",
            params=params,
            dense=True,
            mask_pooling="soft",
        )
        return encoder, {name: f"tower.{name}" for name in params}
    if not case.meta["kind"].startswith("eva"):
        raise Unsupported(f"a tower {case.meta['kind']}")
    scale = case.params["visual_encoder.mask_logit_scale"]
    config = case.meta["vision_cfg"]
    tower = eva_tower(config, len(params["head.weight"]))
    encoder = ClipEva(
        tower,
        mask_mode="maskclippp",
        start_layer=config["layers"] - len(scale),
        last_block="none",
        pos_align_corners=True,
    )
    tower.trunk.load_state_dict(timm_names_from_eva_clip(params))
    encoder.mask_logit_scale.data.copy_(scale)
    renamed = timm_names_from_eva_clip({name: name for name in params})
    return encoder, {official: f"tower.trunk.{name}" for name, official in renamed.items()}


def train_step(case: Case) -> dict[str, Any]:
    meta, x = case.meta, case.inputs
    visual, names = recorded_encoder(case)
    apply_policy(visual, "full" if meta["kind"] == "convnext" else "attention_in")
    psm = weights_of_psm(case)
    if "expand.weight" in psm:
        similarity: nn.Module = LinearSimilarity(
            num_prompts=psm["expand.weight"].shape[1], width=len(psm["expand.weight"])
        )
    else:
        similarity = PseudoTextSimilarity(dim=x["t_embs"].shape[-1], num_heads=4, dropout=0.0)
    similarity.load_state_dict(psm)
    criterion = meta["criterion"]
    model = RecordedText(
        similarity=similarity,
        proposals=nn.Identity(),
        mask_encoder=MaskEncoder(pixel_mean=CLIP_PIXEL_MEAN, pixel_std=CLIP_PIXEL_STD),
        class_loss=MaskClassificationLoss(balanced=criterion["BALANCE_CLS"], temperature=criterion["TEMPERATURE"]),
        ignore_empty=criterion["IGNORE_EMPTY"],
        use_logit_scale=meta["use_logit_scale"],
        context="none" if isinstance(similarity, LinearSimilarity) else "dense",
        clip=Clip(visual=visual, text=None, logit_scale=nn.Parameter(x["logit_scale"].clone(), requires_grad=False)),
        text_classifier=nn.Identity(),
        pixel_mean=CLIP_PIXEL_MEAN,
        pixel_std=CLIP_PIXEL_STD,
        size_divisibility=32,
        inference=MaskInference(
            tasks=["semantic"],
            object_mask_threshold=0.0,
            overlap_threshold=0.0,
            postprocess_before_inference=False,
            top_k=1,
            boxes_from_masks=False,
        ),
        vocabulary=Vocabulary(("class",), (True,)),
    ).train()
    model.rows = x["t_embs"]
    (loss,) = model([training_input(case, i) for i in range(len(case.indexed("image_{}")))]).values()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    outputs = {"loss": loss}
    for official in meta["trainable"]:
        inner = official.removeprefix("visual_encoder.proxy.")
        ours = MASKCLIPPP.rename(official) if inner == official else f"clip.visual.{names[inner]}"
        outputs[f"grad/{official}"] = gradients.pop(ours)
    assert not gradients, f"the recorded step does not train {sorted(gradients)}"
    return outputs


def weights_of_psm(case: Case) -> dict[str, Tensor]:
    renamed = {MASKCLIPPP.rename(key): value for key, value in case.params.items() if key.startswith("psm.")}
    return {name.removeprefix("similarity."): tensor for name, tensor in renamed.items()}


def training_input(case: Case, index: int) -> dict[str, Any]:
    image, masks = case.inputs[f"image_{index}"], case.inputs[f"gt_masks_{index}"]
    instances = Instances(tuple(image.shape[-2:]))
    instances.gt_masks = BitMasks(masks > 0)
    instances.gt_classes = case.inputs[f"gt_classes_{index}"].long()
    return {"image": image, "image_id": index, "instances": instances}


TOPICS = {
    "maskclippp/psm_linear": linear,
    "maskclippp/psm_pseudotext": pseudo_text,
    "maskclippp/reweighted_ce": reweighted_ce,
    "maskclippp/train_step": train_step,
}
