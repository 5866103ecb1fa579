"""CLIP's ResNet and ConvNeXt image towers: features, dense embeddings, regions."""

from __future__ import annotations

import re
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models.convnext import ConvNeXt
from torch import Tensor

from ovseg_d2.modeling.clip.convnext import ClipConvNeXt
from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder
from ovseg_d2.modeling.clip.preprocess import normalise_image, resize_and_pad, resize_masks
from ovseg_d2.modeling.clip.resnet import ClipResNet
from ovseg_d2.modeling.layers.mask_pooling import downsample_masks
from ovseg_d2.structures import ClipFeatures, ImageBatch
from tests.parity import Case, Unsupported

#: Where the public codes keep the tower.
PREFIXES = ("clip_model.visual.", "visual_encoder.proxy.", "visual_encoder.")


def load_tower(encoder: ClipImageEncoder, params: dict[str, Tensor]) -> None:
    """Load a recorded tower; what a method adds to it stands beside it in our encoder."""
    renamed = {}
    for key, value in params.items():
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
        renamed[key if key == "mask_logit_scale" else f"tower.{key}"] = value
    missing, unexpected = encoder.load_state_dict(renamed, strict=False)
    # DenseCLIP's ResNet has no attention pool, and counters of batches are often left out.
    pooled = any(".attnpool." in key for key in renamed)
    missing = [key for key in missing if "num_batches" not in key and (pooled or ".attnpool." not in key)]
    assert not missing and not unexpected, (missing, unexpected)


def convnext(
    *, depths: list[int], dims: list[int], embed_dim: int, proj: str, params: dict[str, Tensor], **options: Any
) -> ClipConvNeXt:
    # TimmModel takes no depths: it is made with a small trunk, which is then replaced.
    tower = TimmModel("convnext_atto", embed_dim=embed_dim, pool="", proj=proj)
    tower.trunk = ConvNeXt(depths=tuple(depths), dims=tuple(dims), num_classes=0)
    tower.head = _head(tower, dims[-1], embed_dim, proj)
    encoder = ClipConvNeXt(tower, **options).eval()
    load_tower(encoder, params)
    return encoder


def _head(tower: TimmModel, in_dim: int, embed_dim: int, proj: str) -> torch.nn.Module:
    head = tower.head
    if proj == "linear":
        head.proj = torch.nn.Linear(in_dim, embed_dim, bias=False)
    else:
        head.mlp.fc1 = torch.nn.Linear(in_dim, head.mlp.fc1.out_features)
    return head


def resnet(
    *,
    layers: list[int],
    output_dim: int,
    heads: int,
    image_size: int,
    width: int,
    params: dict[str, Tensor],
    **options: Any,
) -> ClipResNet:
    tower = ModifiedResNet(layers=layers, output_dim=output_dim, heads=heads, image_size=image_size, width=width)
    encoder = ClipResNet(tower, **options).eval()
    load_tower(encoder, params)
    return encoder


@torch.no_grad()
def fcclip_convnext(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    encoder = convnext(
        depths=ctor["depths"], dims=ctor["dims"], embed_dim=ctor["embed_dim"], proj=ctor["head"], params=case.params
    )
    features = encoder(case.inputs["x"])
    return {
        **features.layers,
        "clip_vis_dense": encoder.tower.trunk.norm_pre(features.layers["res5"]),
        "pooled_projected": encoder.project(case.inputs["pooled"]),
    }


@torch.no_grad()
def fcclip_resnet(case: Case) -> dict[str, Any]:
    encoder = resnet(**case.meta["constructor"], params=case.params)
    features = encoder(case.inputs["x"])
    return {
        **features.layers,
        "clip_vis_dense": features.layers["res5"],
        "resized_masks": downsample_masks(case.inputs["masks"], features.grid),
        "masked_attnpool": encoder.encode_masks(features, case.inputs["masks"], from_logits=True),
    }


@torch.no_grad()
def denseclip_resnet(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    pooled = "output_dim" in ctor
    encoder = resnet(
        layers=ctor["layers"],
        output_dim=ctor.get("output_dim", 1),
        # The ResNet without a pool gets one that is not looked at; the other's has 32 heads whatever its width.
        heads=32 if pooled else 1,
        image_size=ctor.get("input_resolution", 32),
        width=ctor["width"],
        params=case.params,
        dense="attention",
    )
    features = encoder(case.inputs["image"])
    outputs = {name: layer for name, layer in features.layers.items() if name != "stem"}
    if pooled:
        outputs |= {"attnpool_global": features.image_embeds, "attnpool_map": features.dense}
    return outputs


@torch.no_grad()
def maft_resnet(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    encoder = resnet(
        layers=ctor["layers"],
        output_dim=ctor["output_dim"],
        heads=ctor["heads"],
        image_size=ctor["input_resolution"],
        width=ctor["width"],
        params=case.params,
        dense="attention",
        pos_mode="bicubic",
        pos_align_corners=True,
    )
    features = encoder(case.inputs["image"])
    return {
        "embed": features.image_embeds,
        "dense": features.dense.permute(0, 2, 3, 1),
        "layer1": features.layers["res2"],
        "layer4": features.layers["res5"],
    }


@torch.no_grad()
def ipclip_resnet(case: Case) -> dict[str, Any]:
    """The pool alone: what comes before it was given."""
    ctor, feature = case.meta["ctor"], case.inputs["feature"]
    tower = ModifiedResNet(layers=[1, 1, 1, 1], output_dim=1, heads=1, image_size=32, width=2)
    tower.attnpool = AttentionPool2d(**ctor)
    tower.attnpool.load_state_dict(case.params)
    encoder = ClipResNet(tower, mask_pooling="maft", pos_mode="bicubic", pos_align_corners=True).eval()
    features = ClipFeatures(image_embeds=None, dense=None, layers={"res5": feature}, grid=tuple(feature.shape[-2:]))
    return {
        "embeds": encoder.encode_masks(features, case.inputs["masks"]),
        "embed_nomask": encoder.pool(encoder.tokens(feature)),
    }


def maskclippp_inputs(case: Case) -> tuple[ImageBatch, list[Tensor]]:
    """The batch that the encoder sees, and each image's masks on its frame."""
    cfg = case.meta["class_cfg"]
    if cfg.get("DOWNSAMPLE_METHOD", "bilinear") != "bilinear" or cfg.get("DOWN_MASK_THRESH") is not None:
        raise Unsupported("a DOWNSAMPLE_METHOD other than bilinear, or a fixed DOWN_MASK_THRESH")
    mean, std = cfg.get("PIXEL_MEAN"), cfg.get("PIXEL_STD")
    options = {"mean": mean, "std": std} if mean else {}
    images = resize_and_pad(
        [normalise_image(image, **options) for image in case.indexed("image_{}")],
        resize=cfg["TEST_RESIZE_TYPE"],
        input_size=cfg.get("TEST_IMAGE_SIZE", 0),
        size_divisibility=cfg["SIZE_DIVISIBILITY"],
    )
    masks = [
        resize_masks(mask, size, images.padded_size)
        for mask, size in zip(case.indexed("mask_{}"), images.image_sizes, strict=True)
    ]
    return images, masks


def maskclippp_outputs(
    encoder: ClipImageEncoder, images: ImageBatch, masks: list[Tensor], features: ClipFeatures
) -> dict[str, Any]:
    padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    embeds = encoder.encode_masks(features, padded)
    outputs = {
        "proc_images": images.tensor,
        "p_embs": features.dense,
        "i_embs": features.image_embeds[:, :, None, None],
    }
    for i, mask in enumerate(masks):
        down = downsample_masks(mask[None], features.grid)[0]
        outputs |= {
            f"proc_masks_{i}": mask,
            f"down_masks_{i}": down,
            f"areas_{i}": down.sum(dim=(-2, -1)),
            f"m_embs_{i}": embeds[i, : len(mask)],
        }
    return outputs


def numbers(text: str, name: str) -> list[int]:
    """``name=4`` or ``name=(1, 2)`` in a sentence."""
    return [int(number) for number in re.search(rf"{name}=\(?([\d, ]+)\)?", text)[1].split(",") if number.strip()]


@torch.no_grad()
def mask_avg_pool(case: Case) -> dict[str, Any]:
    visual = case.meta["visual"]
    encoder = convnext(
        depths=numbers(visual, "depths"),
        dims=numbers(visual, "dims"),
        embed_dim=numbers(visual, "embed_dim")[0],
        proj=re.search(r"proj='(\w+)'", visual)[1],
        params=case.params,
        dense=True,
        mask_pooling="soft",
    )
    images, masks = maskclippp_inputs(case)
    features = encoder(images.tensor)
    return {"stage4": features.layers["res5"], **maskclippp_outputs(encoder, images, masks, features)}


@torch.no_grad()
def attn_pool(case: Case) -> dict[str, Any]:
    visual, cfg = case.meta["visual"], case.meta["class_cfg"]
    encoder = resnet(
        layers=numbers(visual, "layers"),
        **{name: numbers(visual, name)[0] for name in ("output_dim", "heads", "image_size", "width")},
        params=case.params,
        dense="value",
        mask_pooling="soft",
        learn_mask_logit_scale=cfg["LEARNABLE_MASK_LOGIT_SCALE"],
        mask_logit_scale=cfg["MASK_LOGIT_SCALE"],
        pos_mode="bicubic",
        pos_align_corners=True,
    )
    images, masks = maskclippp_inputs(case)
    features = encoder(images.tensor)
    padded = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    bias = encoder.mask_bias(downsample_masks(padded, features.grid))
    # The reference has a row a position before those of the masks: for its dense embeddings.
    positions = features.grid[0] * features.grid[1]
    own = torch.full((positions, positions), -100.0).fill_diagonal_(0.0)
    rows = torch.cat([own.expand(*bias.shape[:2], -1, -1), bias], dim=2)
    table = encoder.tower.attnpool.positional_embedding
    return {
        "layer4": features.layers["res5"],
        "pos_embed_interp": encoder.resize_pos(table, features.grid),
        "attn_mask": rows.flatten(0, 1),
        **maskclippp_outputs(encoder, images, masks, features),
    }


TOPICS = {
    "fcclip/convnext_backbone": fcclip_convnext,
    "fcclip/rn_backbone": fcclip_resnet,
    "denseclip/clip_resnet_features": denseclip_resnet,
    "maft/clip_resnet": maft_resnet,
    "maft/ipclip_rn50_paperspec": ipclip_resnet,
    "maskclippp/mask_avg_pool": mask_avg_pool,
    "maskclippp/attn_pool": attn_pool,
}
