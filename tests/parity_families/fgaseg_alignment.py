"""FGA-seg: P2Tformer, the text-to-pixel projection with its losses, and both similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ovseg_d2.checkpoint.key_maps.catseg import FGASEG
from ovseg_d2.modeling.losses.pixel_losses import IGNORED, pixel_binary_cross_entropy, text_pixel_alignment_loss
from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows
from ovseg_d2.modeling.pixel_classification.cost_aggregation import CostEmbedding
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import (
    DualPixelTextTransformer,
    GlobalLocalSimilarity,
    PixelToTextTransformer,
    TextToPixelProjection,
)
from tests.parity import Case


def load(module: nn.Module, params: dict[str, Tensor], *, official: str, ours: str) -> nn.Module:
    """Load weights below ``official`` in a public checkpoint, by the map for whole checkpoints."""
    renamed = {FGASEG.rename(f"{official}{name}"): tensor for name, tensor in params.items()}
    module.load_state_dict({name.removeprefix(ours): tensor for name, tensor in renamed.items() if name is not None})
    return module.eval()


@torch.no_grad()
def pixel_to_text(case: Case) -> dict[str, Any]:
    ctor, dense = case.meta["constructor"], case.inputs["imgs_feat"]
    is_dual = "gamma_vision" in case.params
    module_type = DualPixelTextTransformer if is_dual else PixelToTextTransformer
    module = module_type(dim=ctor["d_model"], num_heads=ctor["nhead"], depth=ctor["N"])
    load(module, case.params, official="sem_seg_head.predictor.DCDT.", ours="text_alignment.")
    results: dict[str, Any] = {}
    for i, layer in enumerate(module.layers):
        layer.register_forward_hook(
            lambda _layer, _args, out, i=i: results.__setitem__(f"layer{i}", out.transpose(0, 1))
        )
    out = module(dense, case.inputs["text"])
    text, results["img_embeddings"] = out if is_dual else (out, None)
    results["text_embeddings"] = text[:, :, 0].transpose(0, 1)
    results["pos"] = module.layers[0].position_encoding(dense).expand(len(dense), -1, -1, -1)
    return results


def text_to_pixel_losses(case: Case) -> dict[str, Any]:
    x = case.inputs
    module = TextToPixelProjection(dim=case.meta["constructor"]["word_dim"])
    load(module, case.params, official="sem_seg_head.predictor.proj.", ours="text_projection.")
    labels = x["targets"].long()
    labels[labels == case.meta["ignore_value"]] = IGNORED
    dense = x["img_feats"].clone().requires_grad_()
    text = x["text"].clone().requires_grad_()
    aligned = text.transpose(0, 1)[:, :, None]
    results: dict[str, Any] = {"vis_eval": module.project(dense)}
    results["kernel"], results["bias"] = module.text_kernels(aligned[:, :, 0])
    main = pixel_binary_cross_entropy(x["logits"], labels)
    for mode in ("eval", "train"):
        module.train(mode == "train")
        logits = module(dense, aligned)
        align = text_pixel_alignment_loss(logits, labels)
        results |= {f"align_{mode}": logits, f"loss_align_{mode}": align, f"loss_ce_{mode}": main}
        results[f"total_no_fast_{mode}"] = main + case.meta["lambda_align"] * align
    aux = [pixel_binary_cross_entropy(x[f"aux{i}"], labels) for i in range(3)]
    results |= {f"loss_aux{i}": loss for i, loss in enumerate(aux)}
    results["total_fast_train"] = results["total_no_fast_train"] + case.meta["lambda_auxi"] * aux[0] + aux[1] + aux[2]
    results["grad_align.img_feats"], results["grad_align.text"] = torch.autograd.grad(align, (dense, text))
    for official, norm in (("vis.1.1", module.norm1), ("vis.3.1", module.norm2)):
        results[f"after_train.{official}.running_mean"] = norm.running_mean
        results[f"after_train.{official}.running_var"] = norm.running_var
    return results


@torch.no_grad()
def global_local_similarity(case: Case) -> dict[str, Any]:
    ctor, dense, text = case.meta["constructor"], case.inputs["img_feats"], case.inputs["text_feats"]
    transformer = "sem_seg_head.predictor.transformer."
    is_similarity = {name: name.startswith("Local_align.") for name in case.params}
    similarity = GlobalLocalSimilarity(dim=ctor["C"], kernel_size=ctor["kernel_size"])
    own = {name: tensor for name, tensor in case.params.items() if is_similarity[name]}
    load(similarity, own, official=transformer, ours="cost_head.similarity.")
    cosine, local = similarity(dense, text)
    results: dict[str, Any] = {"S_g": cosine, "S_l": local}
    results["kernel"], results["bias"] = similarity.kernels(text)
    own = {name: tensor for name, tensor in case.params.items() if not is_similarity[name]}
    everything = ClassRows.of_mask(torch.ones(text.shape[:2], dtype=torch.bool))
    for fusion in ("cat", "add"):
        embedding = CostEmbedding(dim=ctor["hidden_dim"], num_prompts=ctor["prompt_channel"], fusion=fusion)
        used = {name: tensor for name, tensor in own.items() if fusion == "cat" or not name.startswith("conv_cat.")}
        load(embedding, used, official=transformer, ours="cost_head.embedding.")
        rows = cosine.transpose(1, 2).flatten(0, 1)  # (N * E, P, h, w)
        fused, embed_l = embedding(everything, rows, local.flatten(0, 1))
        maps = {
            f"fused_{fusion}": fused,
            "embed_l": embed_l,
            "embed_g": embedding.global_conv(rows).permute(0, 2, 3, 1),
        }
        results |= {name: x.unflatten(0, text.shape[:2]).permute(0, 4, 1, 2, 3) for name, x in maps.items()}
    return results


TOPICS = {
    "fgaseg/p2tformer": pixel_to_text,
    "fgaseg/t2p_loss": text_to_pixel_losses,
    "fgaseg/gcs_lcs": global_local_similarity,
}
