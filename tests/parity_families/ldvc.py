"""LDVC's text adapter and local-consensus decoder, ZegCLIP's relation descriptor and attention-to-mask decoder."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.checkpoint.key_maps.zegclip import ZEGCLIP
from ovseg_d2.modeling.mask_classification.host_ensemble import calibrated
from ovseg_d2.modeling.pixel_classification.attention_to_mask import AttentionToMaskDecoder
from ovseg_d2.modeling.pixel_classification.local_consensus import LocalConsensusDecoder, TextAdapter
from tests.parity import Case

#: What ZegCLIP takes off the probabilities of seen classes.
SEEN_BIAS = 0.1
#: Layers of the public ZegCLIP's decoder.
PUBLIC_LAYERS = 3
#: Names of the equation-level vectors -> the block's.
BLOCK_NAMES = {
    "norm1": "norm",
    "lcsa": "self_attention",
    "norm2": "query_norm",
    "norm_t": "text_norm",
    "ca.q": "cross_attention.q_proj",
    "ca.k": "cross_attention.k_proj",
    "ca.v": "cross_attention.v_proj",
    "ca.out": "cross_attention.proj",
    "norm3": "ffn.norm",
    "mlp.fc1": "ffn.linear1",
    "mlp.fc2": "ffn.linear2",
}


def adapter(case: Case, prefix: str, dim: int) -> TextAdapter:
    module = TextAdapter(dim=dim)
    module.load_state_dict({name: case.params[f"{prefix}.{name}"] for name in ("weight", "bias")})
    return module


@torch.no_grad()
def relation_descriptor(case: Case) -> dict[str, Any]:
    image, text = case.inputs["global_embedding"], case.inputs["text_embedding"]
    module = adapter(case, "q_proj", text.shape[-1])
    return {"rd_concat": module.relations(image, text), "t_new": module(image, text)}


def mask_decoder(params: dict[str, Tensor], *, dim: int, heads: int, layers: int) -> AttentionToMaskDecoder:
    """Weights go in by the map for whole checkpoints, whose decoders have three layers: numbers are shifted to that."""
    module = AttentionToMaskDecoder(
        dim=dim, num_layers=layers, num_heads=heads, ffn_dim=len(params["decoder_1.layers.0.linear1.bias"])
    )
    shift, state = PUBLIC_LAYERS - layers, {}
    for key, tensor in params.items():
        if key.startswith("decoder_1."):
            official = re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + shift), key)
            name = ZEGCLIP.rename(f"decode_head.{official}")
            if name is not None:
                name = re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) - shift), name)
                state[name.removeprefix("decoder.")] = tensor
    module.load_state_dict(state)
    return module.eval()


@torch.no_grad()
def atm_head(case: Case) -> dict[str, Any]:
    config, x = case.meta["config"], case.inputs
    image, text = x["global_embedding"], x["text_embedding"]
    module = adapter(case, "q_proj", config["dim"])
    decoder = mask_decoder(case.params, dim=config["dim"], heads=config["heads"], layers=config["layers"])
    queries = module(image, text)
    logits = decoder(x["visual_embedding"], queries)
    logits = F.interpolate(logits, size=(config["img"], config["img"]), mode="bilinear", align_corners=False)
    probs = logits.sigmoid()
    seen = torch.tensor([i in config["seen"] for i in range(len(text))])
    return {
        "rd_concat": module.relations(image, text),
        "t_new": queries,
        "pred_masks_logits": logits,
        "pred_infer": torch.stack([calibrated(p, seen, SEEN_BIAS) for p in probs]),
        "pred_infer_self_training": probs,
    }


@torch.no_grad()
def local_consensus_decoder(case: Case) -> dict[str, Any]:
    config = case.meta["config"]
    decoder = LocalConsensusDecoder(
        dim=config["d"],
        layer_dim=config["W"],
        num_blocks=config["blocks"],
        num_heads=config["heads"],
        ffn_dim=len(case.params["blocks.0.mlp.fc1.bias"]),
        window_size=config["n"],
        top_k=config["m"],
    ).eval()
    state = {}
    for key, tensor in case.params.items():
        if key.startswith("adapter."):
            continue
        blocks, block, rest = key.split(".", 2)
        name = next((rest.replace(a, b, 1) for a, b in BLOCK_NAMES.items() if rest.startswith(f"{a}.")), rest)
        state[f"{blocks}.{block}.{name}"] = tensor.flatten(1) if tensor.dim() == 4 else tensor
    decoder.load_state_dict(state)
    text = adapter(case, "adapter", config["d"])(case.inputs["V_g"], case.inputs["T"])
    results: dict[str, Any] = {"T_new": text}
    for i, block in enumerate(decoder.blocks):

        def keep(module, args, out, i=i) -> None:
            results[f"ids{i}"] = module.route(*args)
            results[f"lcsa{i}"] = out.permute(0, 3, 1, 2)

        block.self_attention.register_forward_hook(keep)
        block.register_forward_hook(
            lambda _block, _args, out, i=i: results.__setitem__(f"V_out{i}", out.permute(0, 3, 1, 2))
        )
    results["logits"] = decoder(case.inputs["V_l"], text, case.indexed("V_j{}"))
    return results


TOPICS = {
    "zegclip/relation_descriptor": relation_descriptor,
    "zegclip/atm_head": atm_head,
    "ldvc_eq/lctd": local_consensus_decoder,
}
