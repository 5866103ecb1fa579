"""CLIP's vision transformers: masks (MaskCLIP++, MAFT), dense embeddings (FGA-seg), pyramid (DenseCLIP), prompts."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.backbones.clip_vit_fpn import ClipViTFPN
from ovseg_d2.modeling.clip.eva import ClipEva, timm_names_from_eva_clip
from ovseg_d2.modeling.clip.image_prompts import DeepImagePrompts
from ovseg_d2.modeling.clip.preprocess import normalise_image, resize_and_pad, resize_masks
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from ovseg_d2.modeling.clip.token_encoder import ClipTokenEncoder
from ovseg_d2.modeling.clip.trainable import split_qkv
from ovseg_d2.modeling.clip.vit import ClipViT
from ovseg_d2.modeling.layers.mask_pooling import downsample_masks
from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding
from tests.parity import Case


def without(params: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights below ``prefix``, under the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}


def openai_vit(*, image_size: int, act_layer: type[nn.Module] = QuickGELU, **sizes: Any) -> VisionTransformer:
    return VisionTransformer(image_size=image_size, act_layer=act_layer, **{"mlp_ratio": 4.0, **sizes})


def recorded_vit(ctor: dict[str, Any]) -> VisionTransformer:
    """Of the sizes of a recorded constructor."""
    sizes = {key: ctor[key] for key in ("patch_size", "width", "layers", "heads", "output_dim")}
    return openai_vit(image_size=ctor["input_resolution"], **sizes)


# ---- MaskCLIP++


def eva_tower(config: dict[str, Any], embed_dim: int) -> TimmModel:
    """An Eva of EVA-CLIP's options; open_clip only knows timm's named models, so the trunk is put in afterwards."""
    rope, grid = config.get("rope", False), config.get("pt_hw_seq_len", 16)
    subln, swiglu = config.get("subln", False), config.get("naiveswiglu", False)
    trunk = Eva(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        num_classes=embed_dim,
        global_pool="token",
        embed_dim=config["width"],
        depth=config["layers"],
        num_heads=config["width"] // config["head_width"],
        mlp_ratio=config["mlp_ratio"],
        qkv_fused=not subln,
        swiglu_mlp=swiglu,
        scale_mlp=subln,
        scale_attn_inner=subln,
        use_rot_pos_emb=rope,
        ref_feat_shape=(grid, grid) if rope else None,
    )
    tower = TimmModel.__new__(TimmModel)
    nn.Module.__init__(tower)
    tower.trunk, tower.head = trunk, nn.Sequential()
    return tower


def maskclippp_encoder(case: Case) -> ClipTokenEncoder:
    meta = case.meta
    options: dict[str, Any] = {
        "mask_mode": "maskclippp",
        "start_layer": meta["class_cfg"]["MASK_PRIOR_BEG"] - 1,
        "last_block": "value",
        "pos_align_corners": True,
    }
    if "vision" in meta:
        sizes = dict(meta["vision"])
        act = {"nn.GELU": nn.GELU, "QuickGELU": QuickGELU}[sizes.pop("act", "nn.GELU")]
        layers = sizes["layers"]
        tower: nn.Module = openai_vit(act_layer=act, **sizes)
        encoder_class: type[ClipTokenEncoder] = ClipViT
    else:
        layers = meta["vision_cfg"]["layers"]
        tower = eva_tower(meta["vision_cfg"], meta["embed_dim"])
        encoder_class = ClipEva
    last, before = layers - 1, options["start_layer"] - 1
    encoder = encoder_class(tower, out_layers=[f"block{before}", f"block{last}"], **options)
    weights = without(case.params, "visual_encoder.proxy.")
    if encoder_class is ClipEva:
        tower.trunk.load_state_dict(timm_names_from_eva_clip(weights))
    else:
        tower.load_state_dict(weights)
    encoder.mask_logit_scale.data.copy_(case.params["visual_encoder.mask_logit_scale"])
    return encoder.eval()


@torch.no_grad()
def vit_masked(case: Case) -> dict[str, Any]:
    config = case.meta["class_cfg"]
    encoder = maskclippp_encoder(case)
    batch = resize_and_pad(
        [normalise_image(x) for x in case.indexed("image_{}")],
        resize=config["TEST_RESIZE_TYPE"],
        input_size=config.get("TEST_IMAGE_SIZE", 0),
        size_divisibility=config["SIZE_DIVISIBILITY"],
    )
    images = batch.tensor
    masks = [
        resize_masks(mask, size, batch.padded_size)
        for mask, size in zip(case.indexed("mask_{}"), batch.image_sizes, strict=True)
    ]
    features = encoder(images)
    first, last = (features.layers[name] for name in encoder.out_layers)
    outputs: dict[str, Any] = {
        "proc_images": images,
        "block_before_prior": first,
        "block_last": last,
        "p_embs": features.dense,
        "i_embs": features.image_embeds[..., None, None],
    }
    if isinstance(encoder, ClipEva):
        table = encoder.tower.trunk.pos_embed
        outputs["pos_embed_interp"] = resize_position_embedding(
            table, features.grid, mode=encoder.pos_mode, align_corners=encoder.pos_align_corners
        )
    for i, mask in enumerate(masks):
        single = encoder(images[i : i + 1])
        embeds = encoder.encode_masks(single, mask[None])[0]
        outputs |= {
            f"proc_masks_{i}": mask,
            f"m_embs_single_{i}": embeds,
            f"m_embs_{i}": embeds,
            f"p_embs_single_{i}": single.dense,
            f"i_embs_single_{i}": single.image_embeds[..., None, None],
            f"areas_{i}": downsample_masks(mask[None], features.grid)[0].sum(dim=(-2, -1)),
            # Row 0 of the recorded bias is the last block.
            f"mask_bias_{i}": torch.cat(encoder.mask_bias(mask[None], features.grid)[::-1]),
        }
    return outputs


# ---- FGA-seg


@torch.no_grad()
def clip_dense(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["constructor"], case.inputs
    tower = openai_vit(
        image_size=ctor["res"],
        patch_size=ctor["patch"],
        width=ctor["width"],
        layers=ctor["layers"],
        heads=ctor["heads"],
        output_dim=ctor["embed"],
    )
    for block in tower.transformer.resblocks:
        split_qkv(block.attn)
    tower.load_state_dict(without(case.params, "visual."))
    hooks = sorted(name for name in case.expected if name.startswith("hook"))
    blocks = [name.replace("hook", "block") for name in hooks]
    encoder = ClipViT(tower, last_block="value_cls", out_layers=blocks).eval()
    states = encoder.token_states(x["image"])
    outputs: dict[str, Any] = {"dense": encoder.head(states.dense)}
    # Recorded sequence first.
    outputs |= {hook: states.layers[block].transpose(0, 1) for hook, block in zip(hooks, blocks, strict=True)}
    outputs["text_raw"] = text_encoder(case)(x["tokens"].long())
    outputs["text"] = F.normalize(outputs["text_raw"], dim=-1)[:, None]
    return outputs


def text_encoder(case: Case) -> nn.Module:
    """The text tower of a recorded CLIP."""
    ctor = case.meta["constructor"]
    tower = TextTransformer(
        context_length=ctor["ctx"],
        vocab_size=ctor["vocab"],
        width=ctor["twidth"],
        heads=ctor["theads"],
        layers=ctor["tlayers"],
        output_dim=ctor["embed"],
        act_layer=QuickGELU,
    )
    for block in tower.transformer.resblocks:
        split_qkv(block.attn)
    names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    tower.load_state_dict({key: value for key, value in case.params.items() if key.startswith(names)})
    model = nn.Module()
    model.text = tower
    return ClipTextEncoder.from_open_clip(model).eval()


# ---- DenseCLIP


@torch.no_grad()
def clip_vit_fpn(case: Case) -> dict[str, Any]:
    ctor = dict(case.meta["constructor"])
    tower = recorded_vit(ctor)
    encoder = ClipViT(
        tower,
        out_layers=[f"block{i}" for i in ctor["out_indices"]],
        extra_class_embedding=True,
        drop_path_rate=ctor["drop_path_rate"],
        pos_mode="bilinear",
    )
    backbone = ClipViTFPN(encoder=encoder, norm="SyncBN").eval()
    weights = {key if key.startswith("fpn") else f"encoder.tower.{key}": value for key, value in case.params.items()}
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing), (missing, unexpected)
    features = encoder(case.inputs["image"])
    return {
        **backbone.pyramid(features.layers),
        "global_embedding": features.image_embeds,
        "visual_embedding": features.dense,
    }


# ---- MAFT


@torch.no_grad()
def ipclip_vit(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["ctor"], case.inputs
    tower = recorded_vit(ctor)
    tower.load_state_dict(case.params)
    start, last = case.meta["start_layers_L"], ctor["layers"] - 1
    encoder = ClipViT(tower, mask_mode="maft", start_layer=start, pos_align_corners=True).eval()
    features = encoder(x["image"])
    embeds = encoder.encode_masks(features, x["masks"])
    outputs: dict[str, Any] = {
        "embeds": embeds,
        "embeds_nomask": features.image_embeds,
        "dense_nomask": features.dense.permute(0, 2, 3, 1),
        "tokens_after_ln_pre": encoder.embed(x["image"])[0],
        f"tokens_after_block{start - 1}": features.tokens,
        "attn_blocked": blocked_matrix(encoder.mask_bias(x["masks"], features.grid)[0]),
    }
    states = encoder.mask_states(features, x["masks"], finish_image=True)
    for index, (tokens, image) in enumerate(states, start=start):
        outputs[f"tokens_after_block{index}"] = torch.cat([tokens, image], dim=1)
        if index == last:
            outputs["dense_masked"] = encoder.head(image).unflatten(1, features.grid)
    for suffix, clip in (("", embeds), ("_nomask", features.image_embeds)):
        logits = 100 * F.normalize(clip, dim=-1) @ x["text_features"].T
        outputs |= {f"logits{suffix}": logits, f"scores{suffix}": logits[..., :-1].softmax(dim=-1)}
    return outputs


def blocked_matrix(bias: Tensor) -> Tensor:
    """Which of all tokens, mask tokens first, do not see which: bias (N, 1, Q, L) -> (N, Q + L, Q + L)."""
    outside = bias[:, 0] == float("-inf")
    batch, num_masks, num_patches = outside.shape
    eye = torch.eye(num_masks, dtype=torch.bool).expand(batch, -1, -1)
    patches = torch.zeros(batch, num_patches, num_masks + num_patches, dtype=torch.bool)
    patches[..., :num_masks] = True
    return torch.cat([torch.cat([~eye, outside], dim=2), patches], dim=1).float()


# ---- ZegCLIP


@torch.no_grad()
def vpt_vit(case: Case) -> dict[str, Any]:
    ctor, images = case.meta["constructor"], case.inputs["image"]
    tower = recorded_vit(ctor)
    tower.load_state_dict({key: value for key, value in case.params.items() if "prompt" not in key})
    prompts = DeepImagePrompts(
        num_layers=1 + ctor["total_d_layer"],
        num_tokens=ctor["num_tokens"],
        dim=ctor["prompt_dim"],
        patch_size=ctor["patch_size"],
    )
    embeddings = torch.cat([case.params["prompt_embeddings"], case.params["deep_prompt_embeddings"]])
    weights = {
        "embeddings": embeddings,
        **{f"proj.{key}": value for key, value in without(case.params, "prompt_proj.").items()},
        **{f"last_norm.{key}": value for key, value in without(case.params, "prompt_norm.").items()},
    }
    prompts.load_state_dict(weights)
    maps = [name for name in case.expected if name.endswith("_map")]
    encoder = ClipViT(
        tower,
        out_layers=[name.removesuffix("_map") for name in maps],
        extra_class_embedding=True,
        pos_mode="bilinear",
        prompts=prompts,
    ).eval()
    features = encoder(images)
    return {
        "visual_embedding": F.normalize(features.dense, dim=1),
        "global_embedding": F.normalize(features.image_embeds, dim=1),
        "ln_pre_tokens": encoder.embed(images)[0],
        "prompt_norm_tokens": encoder.token_states(images).last,
        **{name: features.layers[name.removesuffix("_map")] for name in maps},
    }


TOPICS = {
    "maskclippp/vit_masked": vit_masked,
    "fgaseg/clip_dense": clip_dense,
    "denseclip/clip_vit_fpn": clip_vit_fpn,
    "maft/ipclip_vit": ipclip_vit,
    "zegclip/vpt_vit": vpt_vit,
}
