"""Every tensor of a public ZegCLIP has its place in ours, and nothing in ours is without one."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.modeling import build_model

import ovseg_d2.data
import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.engine.load_config import load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "zegclip" / "coco_156_ViTB16.yaml"
PROMPTS, WIDTH, DIM, FFN = 100, 768, 512, 2048


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def blocks(place: str, dim: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i in range(12):
        block = f"{place}.transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * dim, dim), f"{block}.attn.in_proj_bias": (3 * dim,)}
        shapes |= linear(f"{block}.attn.out_proj", dim, dim)
        shapes |= norm(f"{block}.ln_1", dim) | norm(f"{block}.ln_2", dim)
        shapes |= linear(f"{block}.mlp.c_fc", dim, 4 * dim) | linear(f"{block}.mlp.c_proj", 4 * dim, dim)
    return shapes


def public_shapes() -> dict[str, tuple[int, ...]]:
    """Of the public model on COCO-Stuff, with its text tower."""
    shapes = {
        "backbone.prompt_embeddings": (1, PROMPTS, WIDTH),
        "backbone.deep_prompt_embeddings": (11, PROMPTS, WIDTH),
        "backbone.class_embedding": (WIDTH,),
        "backbone.positional_embedding": (1 + 32 * 32, WIDTH),
        "backbone.conv1.weight": (WIDTH, 3, 16, 16),
        "backbone.proj": (WIDTH, DIM),
        **norm("backbone.ln_pre", WIDTH),
        **norm("backbone.ln_post", WIDTH),
        **norm("backbone.prompt_norm", WIDTH),
        **linear("backbone.prompt_proj", WIDTH, WIDTH),
        **blocks("backbone", WIDTH),
        "text_encoder.token_embedding.weight": (49408, DIM),
        "text_encoder.positional_embedding": (77, DIM),
        "text_encoder.text_projection": (DIM, DIM),
        **norm("text_encoder.ln_final", DIM),
        **blocks("text_encoder", DIM),
        **linear("decode_head.q_proj", 2 * DIM, DIM),
        "decode_head.loss_decode.criterion.empty_weight": (157,),
    }
    for i in range(3):
        layer = f"decode_head.decoder_1.layers.{i}"
        shapes |= {f"{layer}.self_attn.in_proj_weight": (3 * DIM, DIM), f"{layer}.self_attn.in_proj_bias": (3 * DIM,)}
        shapes |= linear(f"{layer}.self_attn.out_proj", DIM, DIM)
        for part in ("q", "k", "v", "proj"):
            shapes |= linear(f"{layer}.multihead_attn.{part}", DIM, DIM)
        shapes |= linear(f"{layer}.linear1", DIM, FFN) | linear(f"{layer}.linear2", FFN, DIM)
        for part in ("norm1", "norm2", "norm3"):
            shapes |= norm(f"{layer}.{part}", DIM)
    return shapes


def test_every_tensor_has_a_place():
    public = {name: torch.empty(shape, device="meta") for name, shape in public_shapes().items()}
    converted, message = convert_state_dict(public)
    # That of the loss, 6 of each layer's self-attention, and 12 that the last one does not use.
    assert message.startswith("public ZegCLIP: ") and "31 without counterpart dropped" in message
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        own = build_model(cfg).state_dict()
    # The scale, which nothing here depends on, is the pretrained CLIP's.
    assert set(own) - set(converted) == {"clip.logit_scale"}
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in own.items() if n in converted}
    assert len(converted) + 1 == len(own)


def test_prompts_are_joined_in_the_order_of_the_blocks():
    public = {
        "backbone.deep_prompt_embeddings": 2 * torch.ones(2, 3, 4),
        "backbone.prompt_embeddings": torch.ones(1, 3, 4),
        "decode_head.q_proj.bias": torch.zeros(2),
    }
    converted, _ = convert_state_dict(public)
    assert set(converted) == {"clip.visual.prompts.embeddings", "text_adapter.bias"}
    assert converted["clip.visual.prompts.embeddings"][:, 0, 0].tolist() == [1, 2, 2]
    # A shallow model has those of the first block alone.
    del public["backbone.deep_prompt_embeddings"]
    assert convert_state_dict(public)[0]["clip.visual.prompts.embeddings"].shape == (1, 3, 4)
