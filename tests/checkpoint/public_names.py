"""Names and shapes of whole public checkpoints: listed from the public code's own models (``state_dicts``), or derived.

A list has all tensors of the model that the public code builds. What is derived comes from such a list, where models
share parts, and from the sizes of the architecture; no file of those could be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tests.checkpoint.test_zegclip_files import linear, norm
from tests.checkpoint.test_zegclip_files import public_shapes as zegclip_shapes

LISTS = Path(__file__).parent / "state_dicts"
Shapes = dict[str, tuple[int, ...]]
_LINE = re.compile(r"(\S+) \(([\d, ]*)\)( \w+)?")


@cache
def _listed(name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    matches = map(_LINE.fullmatch, (LISTS / f"{name}.txt").read_text().splitlines())
    return tuple((m[1], tuple(int(n) for n in m[2].split(",") if n.strip())) for m in matches)


def listed(name: str) -> Shapes:
    return dict(_listed(name))


def maskformer() -> Shapes:
    """ZegFormer with a linear classifier."""
    parts = ("bg_feature", "logit_scale", "projection_layer.", "clip_model.")
    own = tuple(f"sem_seg_head.predictor.{part}" for part in parts)
    shapes = {name: shape for name, shape in listed("zegformer").items() if not name.startswith(own)}
    return shapes | linear("sem_seg_head.predictor.class_embed", 256, 151)


def early_mask2former() -> Shapes:
    """Before the pixel decoder was a module of its own, and with the first name of the queries."""
    names = {"sem_seg_head.pixel_decoder.": "sem_seg_head.", ".predictor.query_feat.": ".predictor.static_query."}
    shapes = {}
    for name, shape in listed("mask2former_r50_ade20k").items():
        for new, old in names.items():
            name = name.replace(new, old)
        shapes[name] = shape
    return shapes


def maft_plus() -> Shapes:
    """FC-CLIP for 171 classes with 100 queries, and the content transfer."""
    sizes = {
        "criterion.empty_weight": (172,),
        "sem_seg_head.predictor.query_feat.weight": (100, 256),
        "sem_seg_head.predictor.query_embed.weight": (100, 256),
    }
    place, dim = "cdt.cross_atten", 768
    attention = {f"{place}.multihead_attn.in_proj_weight": (3 * dim, dim)}
    attention |= {f"{place}.multihead_attn.in_proj_bias": (3 * dim,)}
    attention |= linear(f"{place}.multihead_attn.out_proj", dim, dim)
    return (
        listed("fcclip_convnext_large")
        | sizes
        | attention
        | linear(f"{place}.MLP", dim, dim)
        | norm(f"{place}.norm", dim)
    )


def cat_seg() -> Shapes:
    """FGA-seg without its additions."""
    additions = re.compile(
        r"\.predictor\.(DCDT|proj)\.|\.transformer\.(conv2|conv_cat|corr_local_decoder_projection|Local_align)"
    )
    return {name: shape for name, shape in listed("fga_seg_B_no_fast_cat").items() if not additions.search(name)}


def prompts() -> Shapes:
    return {name: shape for name, shape in listed("zsseg").items() if ".prompt_learner." in name}


def _linear_similarity() -> Shapes:
    """Of 14 templates."""
    return linear("psm.corr_proj_in.0", 14, 768) | linear("psm.corr_proj_out.0", 768, 1)


def maskclippp_convnext() -> Shapes:
    """The image tower is that of FC-CLIP."""
    inner, dim = "backbone.clip_model.visual.", 768
    shapes = {
        f"visual_encoder.proxy.{name.removeprefix(inner)}": shape
        for name, shape in listed("fcclip_convnext_large").items()
        if name.startswith(inner)
    }
    shapes |= {"psm.img2text.in_proj_weight": (3 * dim, dim), "psm.img2text.in_proj_bias": (3 * dim,)}
    shapes |= linear("psm.img2text.out_proj", dim, dim) | norm("psm.ln_1", dim)
    return shapes | {"psm.img_proj.weight": (dim, dim)}


def _eva(*, width: int, depth: int, hidden: int, heads: int, tokens: int, dim: int) -> Shapes:
    place = "visual_encoder.proxy"
    shapes = {
        "visual_encoder.mask_logit_scale": (3, heads),
        f"{place}.cls_token": (1, 1, width),
        f"{place}.pos_embed": (1, tokens, width),
        f"{place}.patch_embed.proj.weight": (width, 3, 14, 14),
        f"{place}.patch_embed.proj.bias": (width,),
        **norm(f"{place}.norm", width),
        **linear(f"{place}.head", width, dim),
    }
    for i in range(depth):
        block = f"{place}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        shapes |= {f"{block}.attn.{part}_bias": (width,) for part in "qv"} | linear(f"{block}.attn.proj", width, width)
    return shapes


def maskclippp_eva02() -> Shapes:
    """EVA-02 L/14 at 336 pixels, with rotary positions, and its text tower; one template."""
    width, hidden, dim = 1024, 2730, 768
    shapes = _eva(width=width, depth=24, hidden=hidden, heads=16, tokens=577, dim=dim)
    shapes |= {"visual_encoder.proxy.rope.freqs_cos": (576, 64), "text_encoder.logit_scale": ()}
    for i in range(24):
        block = f"visual_encoder.proxy.blocks.{i}"
        shapes |= {f"{block}.attn.{part}_proj.weight": (width, width) for part in "qkv"}
        shapes |= norm(f"{block}.attn.inner_attn_ln", width) | norm(f"{block}.mlp.ffn_ln", hidden)
        shapes |= linear(f"{block}.mlp.w1", width, hidden) | linear(f"{block}.mlp.w2", width, hidden)
        shapes |= linear(f"{block}.mlp.w3", hidden, width)
    place = "backbone.clip_model."  # FC-CLIP's text tower has another depth, and the same width
    for name, shape in listed("fcclip_convnext_large").items():
        inside = name.startswith(place) and not name.startswith(f"{place}visual.") and name != f"{place}logit_scale"
        block = re.search(r"resblocks\.(\d+)\.", name)
        if inside and (block is None or int(block[1]) < 12):
            shapes[f"text_encoder.proxy.{name.removeprefix(place)}"] = shape
    return shapes | linear("psm.corr_proj_in.0", 1, dim) | linear("psm.corr_proj_out.0", dim, 1)


def maskclippp_eva01() -> Shapes:
    """EVA-01 g/14+."""
    width, hidden, dim = 1408, 6144, 1024
    shapes = _eva(width=width, depth=40, hidden=hidden, heads=16, tokens=257, dim=dim)
    for i in range(40):
        block = f"visual_encoder.proxy.blocks.{i}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * width, width)}
        shapes |= linear(f"{block}.mlp.fc1", width, hidden) | linear(f"{block}.mlp.fc2", hidden, width)
    return shapes | _linear_similarity()


def resnet() -> Shapes:
    """torchvision's ResNet-50."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in resnet50().state_dict().items() if "num_batches" not in name}


def swin() -> Shapes:
    """Some tensors of every kind in the public Swin-T."""
    block = "layers.0.blocks.0"
    return {
        **linear("patch_embed.proj", 48, 96),
        f"{block}.attn.relative_position_bias_table": (169, 3),
        f"{block}.attn.relative_position_index": (49, 49),
        "layers.0.blocks.1.attn_mask": (64, 49, 49),
        **linear(f"{block}.attn.qkv", 96, 288),
        **norm(f"{block}.norm1", 96),
        **norm("norm", 768),
        **linear("head", 768, 1000),
    }


@dataclass(frozen=True)
class Public:
    """A public checkpoint.

    Attributes:
        layout: that must be recognised.
        shapes: of all tensors.
        dropped: pattern of those without counterpart, written down apart from the conversion.
        exact: from a list of the public code's own model.
    """

    layout: str
    shapes: Callable[[], Shapes]
    dropped: str
    exact: bool = False


def _list(name: str, layout: str, dropped: str) -> Public:
    return Public(f"public {layout}", lambda: listed(name), dropped, exact=True)


_LOSS = r"criterion\.empty_weight"
_ADAPTER = rf"{_LOSS}|clip_adapter\.pixel_(mean|std)|clip_adapter\.prompt_learner\.(start|dot|end|pad)_signal"
_CAUSAL = r"sem_seg_head\.predictor\.transformer\.layers\.\d\.swin_block\.block_2\.attn_mask"
_ATM = (
    r"decode_head\.(loss_decode\..*|decoder_1\.layers\.\d\.(self_attn\..*|norm1\..*)"
    r"|decoder_1\.layers\.2\.(multihead_attn\.(v|proj)|norm[23]|linear[12])\..*)"
)
PUBLIC = {
    "mask2former": _list("mask2former_r50_ade20k", "Mask2Former", _LOSS),
    "fcclip": _list("fcclip_convnext_large", "FC-CLIP", _LOSS),
    "zegformer": _list("zegformer", "ZegFormer", _LOSS),
    "zsseg": _list("zsseg", "ZSSeg", _ADAPTER),
    "ovseg": _list("ovseg", "OVSeg", _ADAPTER),
    "freeseg": _list("freeseg", "FreeSeg", _ADAPTER),
    "maft": _list("maft", "MAFT", rf"{_ADAPTER}|T\..*"),
    "fga_seg": _list("fga_seg_B_no_fast_cat", "FGA-seg", _CAUSAL),
    "cat_seg": Public("public CAT-Seg", cat_seg, _CAUSAL),
    "maskformer": Public("public MaskFormer", maskformer, _LOSS),
    "early_mask2former": Public("public Mask2Former", early_mask2former, _LOSS),
    "maft_plus": Public("public MAFT+", maft_plus, _LOSS),
    "maskclippp_convnext": Public("public MaskCLIP++", maskclippp_convnext, "-"),
    "maskclippp_eva01": Public("public MaskCLIP++ on EVA-01", maskclippp_eva01, "-"),
    "maskclippp_eva02": Public("public MaskCLIP++ on EVA-02", maskclippp_eva02, r".*\.rope\..*"),
    "zegclip": Public("public ZegCLIP", zegclip_shapes, _ATM),
    "prompts": Public("public prompts", prompts, r".*_signal"),
    "resnet": Public("torchvision ResNet", resnet, r"fc\..*"),
    "swin": Public("public Swin", swin, r"(head|norm)\..*|.*\.(relative_position_index|attn_mask)"),
}
