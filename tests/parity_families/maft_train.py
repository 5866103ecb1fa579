"""MAFT's training and evaluation: losses, gradients, IP-CLIP's embeddings, the host's result."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.clip.vit import ClipViT
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.losses.mask_aware import MaskAwareLoss, distill_loss, normalized_iou, soft_iou
from ovseg_d2.modeling.mask_classification.host_ensemble import HostEnsemble
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder
from ovseg_d2.modeling.meta_arch.maft import MAFT
from ovseg_d2.structures import (
    ClipFeatures,
    ImageBatch,
    MaskProposals,
    SegmentationTargets,
    TextClasses,
    Vocabulary,
    pad_masks,
)
from tests.parity import Case


def targets_of(case: Case, size: tuple[int, int]) -> list[SegmentationTargets]:
    return [
        SegmentationTargets(labels.long(), pad_masks(masks > 0.5, size))
        for labels, masks in zip(case.indexed("gt_labels_{}"), case.indexed("gt_masks_{}"), strict=True)
    ]


def mask_aware_loss(case: Case) -> dict[str, Any]:
    size = tuple(case.meta["padded_size"])
    mask_probs = F.interpolate(
        case.inputs["pred_mask_logits"], size=size, mode="bilinear", align_corners=True
    ).sigmoid()
    logits = case.inputs["clip_logits"].clone().requires_grad_()
    clip_probs = logits[..., :-1].softmax(-1)
    targets = targets_of(case, size)
    iou = torch.cat([soft_iou(mask_probs[i], target.masks) for i, target in enumerate(targets)])
    loss = MaskAwareLoss()(clip_probs, mask_probs, targets)
    loss.backward()
    return {
        "mask_probs": mask_probs,
        "iou": iou,
        "iou_norm": normalized_iou(iou),
        "selected": torch.cat([clip_probs[i, :, target.class_ids].T for i, target in enumerate(targets)]),
        "ma_loss": loss.reshape(1),
        "grad_clip_logits": logits.grad,
    }


def distillation(case: Case) -> dict[str, Any]:
    student = case.inputs["student_logits"].clone().requires_grad_()
    loss = distill_loss(student[..., :-1], case.inputs["teacher_logits"][..., :-1])
    weighted = case.meta["dis_weight"] * loss
    weighted.backward()
    return {
        "dis_loss": weighted.reshape(1),
        "dis_loss_unweighted": loss.reshape(1),
        "grad_student_logits": student.grad,
    }


class RecordedProposals(nn.Module):
    """The masks of a case."""

    def __init__(self, mask_logits: Tensor) -> None:
        super().__init__()
        self.mask_logits = mask_logits

    def forward(self, images: ImageBatch, features: ClipFeatures | None, text: TextClasses | None) -> MaskProposals:
        return MaskProposals(mask_logits=self.mask_logits)


class RecordedTextMAFT(MAFT):
    """The class texts of a case, whatever the vocabulary."""

    rows: Tensor

    def query_text(self, vocabulary: Vocabulary, task: str = "") -> TextClasses:
        num_classes = len(self.rows)
        every = torch.ones(num_classes, dtype=torch.bool)
        return TextClasses(self.rows[:, None], torch.arange(num_classes), every, every)

    region_text = query_text


def maft_forward(case: Case) -> dict[str, Any]:
    meta, x = case.meta, case.inputs
    sizes = dict(meta["ctor"])
    positions = {"pos_mode": "bicubic", "pos_align_corners": True}

    def tower() -> VisionTransformer:
        return VisionTransformer(
            image_size=sizes["input_resolution"],
            mlp_ratio=4.0,
            act_layer=QuickGELU,
            **{key: sizes[key] for key in ("patch_size", "width", "layers", "heads", "output_dim")},
        )

    clip = Clip(visual=ClipViT(tower(), **positions), text=None, logit_scale=nn.Parameter(torch.tensor(100.0).log()))
    model = RecordedTextMAFT(
        ip_clip=ClipViT(tower(), mask_mode="maft", start_layer=meta["start_layers_L"], last_block="none", **positions),
        mask_aware_loss=MaskAwareLoss(),
        mask_aware_weight=1.0,
        distill_weight=meta["dis_weight"],
        proposals=RecordedProposals(x["pred_mask_logits"]),
        criterion=None,
        mask_encoder=MaskEncoder(
            pixel_mean=CLIP_PIXEL_MEAN,
            pixel_std=CLIP_PIXEL_STD,
            resize="padded_square",
            input_size=480,
            align_corners=True,
        ),
        ensemble=HostEnsemble(name="none"),
        clip=clip,
        text_classifier=nn.Identity(),
        pixel_mean=CLIP_PIXEL_MEAN,
        pixel_std=CLIP_PIXEL_STD,
        size_divisibility=meta["size_divisibility"],
        inference=MaskInference(
            tasks=["semantic"],
            object_mask_threshold=0.0,
            overlap_threshold=0.0,
            postprocess_before_inference=False,
            top_k=1,
            boxes_from_masks=False,
            align_corners=True,
        ),
        vocabulary=None,
    )
    model.rows = x["text_features"][:-1]
    weights, _ = convert_state_dict(case.params)
    problems = model.load_state_dict(weights, strict=False)
    assert not problems.unexpected_keys and all(name == "clip.logit_scale" for name in problems.missing_keys), problems

    vocabulary = Vocabulary(tuple(f"class {i}" for i in range(meta["C"])), (True,) * meta["C"])
    batch = [
        {"image": image, "height": height, "width": width, "vocabulary": vocabulary}
        for image, (height, width) in zip(case.indexed("image_{}"), meta["output_sizes"], strict=True)
    ]
    images = model.preprocess(batch)
    losses = model.losses(images, targets_of(case, images.padded_size), vocabulary)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.ip_clip.tower.named_parameters()}
    with torch.no_grad():
        model.eval()
        copy = model.mask_encoder.clip_copy(images)
        embeds, _ = model.mask_embeds(images, model.proposals(images, None, None))
        results = model(batch)
    return {
        "ma_loss": losses["loss_mask_aware"].reshape(case.expected["ma_loss"].shape),
        "dis_loss": losses["loss_distill"].reshape(case.expected["dis_loss"].shape),
        "clip_input_sub": copy.tensor[:, :, 7::31, 5::29],
        "embeds": embeds,
        **{f"grad/{name}": gradient for name, gradient in gradients.items() if f"grad/{name}" in case.expected},
        **{f"sem_seg_{i}": result["sem_seg"] for i, result in enumerate(results)},
    }


TOPICS = {
    "maft/mask_aware_loss": mask_aware_loss,
    "maft/distill_loss": distillation,
    "maft/maft_forward": maft_forward,
}
