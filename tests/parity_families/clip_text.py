"""CLIP's text tower with and without prompts, and DenseCLIP's context decoder."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIPTextCfg
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.prompts import DeepTextPrompts, LearnableContexts, SentencePrompts
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from ovseg_d2.modeling.layers.context_decoder import ContextDecoder
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import Vocabulary
from tests.parity import Case, Unsupported


def tower(params: dict[str, Tensor], *, heads: int) -> ClipTextEncoder:
    """CLIP's tower (QuickGELU) of the sizes and with the weights of ``params``."""
    model = nn.Module()
    model.text = TextTransformer(
        context_length=len(params["positional_embedding"]),
        vocab_size=len(params["token_embedding.weight"]),
        width=params["text_projection"].shape[0],
        heads=heads,
        layers=len({key.split(".")[2] for key in params if key.startswith("transformer.resblocks.")}),
        output_dim=params["text_projection"].shape[1],
        pool_type=CLIPTextCfg.pool_type,
        act_layer=QuickGELU,
    )
    encoder = ClipTextEncoder.from_open_clip(model)
    encoder.load_state_dict(params)
    return encoder.eval()


def text_encoder(case: Case) -> ClipTextEncoder:
    return tower(case.params, heads=case.meta["constructor"]["transformer_heads"])


@torch.no_grad()
def clip_text_encoder(case: Case) -> dict[str, Any]:
    return {"text_embeddings": text_encoder(case)(case.inputs["text"])}


@torch.no_grad()
def text_context_encoder(case: Case) -> dict[str, Any]:
    encoder = text_encoder(case)
    text, contexts = case.inputs["text"], case.inputs["contexts"]
    prompts = LearnableContexts(num_contexts=len(contexts), length=contexts.shape[1], dim=encoder.width)
    prompts.load_state_dict({"contexts": contexts})
    return {
        "text_embeddings": prompts(encoder, text, class_ids=torch.arange(len(text))),
        "ln_final_tokens": encoder.token_states(text, contexts=contexts).flatten(0, 1),
    }


@torch.no_grad()
def context_decoder(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["constructor"], case.inputs
    module = ContextDecoder(
        embed_dim=ctor["visual_dim"],
        dim=ctor["transformer_width"],
        num_heads=ctor["transformer_heads"],
        num_layers=ctor["transformer_layers"],
        dropout=ctor["dropout"],
    )
    module.load_state_dict(case.params)
    text_diff = module.eval()(x["text"], x["visual"])
    return {"text_diff": text_diff, "text_updated": x["text"] + x["gamma"] * text_diff}


@torch.no_grad()
def deep_text_prompt(case: Case) -> dict[str, Any]:
    encoder, names = text_encoder(case), case.inputs["names"]
    random_prompts = case.inputs["random_prompts"]
    num_layers, num_tokens, dim = random_prompts.shape
    prompts = DeepTextPrompts(num_layers=num_layers, num_tokens=num_tokens, dim=dim)
    prompts.init_from_template(encoder, case.inputs["template"])
    init = prompts.prompts.clone()
    text_init = prompts(encoder, names)[0]
    prompts.load_state_dict({"prompts": random_prompts})
    words = case.inputs["template"][:, 1:-1].expand(len(names), -1)
    return {
        "init_prompts": init,
        "text_init": text_init,
        "text_plain_full_sentence": encoder(torch.cat([names[:, :1], words, names[:, 1:]], dim=1)),
        "text_random": prompts(encoder, names)[0],
    }


@torch.no_grad()
def sentence_prompts(case: Case) -> dict[str, Any]:
    meta, x = case.meta, case.inputs
    tokenizer = clip_tokenizer("ViT-B-16")
    params = {key.removeprefix("clip_model."): v for key, v in case.params.items() if key.startswith("clip_model.")}
    # Only the embeddings of the words in use are recorded.
    rows = params.pop("token_embedding.rows")
    params["token_embedding.weight"] = rows.new_zeros(tokenizer.vocab_size, rows.shape[1])
    params["token_embedding.weight"][x["token_ids"].long()] = rows
    encoder = tower(params, heads=meta["text_ctor"]["heads"])
    if not torch.equal(tokenizer(meta["nouns"]), x["noun_tokens"].long()):
        raise Unsupported("other tokens than CLIP's")

    prompts, templates = None, meta["templates"] or ["{}"]
    if meta["class"] == "LearnablePromptExtractor":
        prefix, suffix = meta["prompt_shape"]
        prompts = SentencePrompts(
            dim=encoder.width,
            prefix=prefix,
            suffix=suffix,
            full_stop=tokenizer.encode(".")[0],
            task_prompts=meta["task_prompt_shape"] or 0,
            task_tokens=[tokenizer.encode(name) for name in meta["task_names"] or ()],
        )
        learned = {key.removeprefix("prompt_learner."): value for key, value in case.params.items()}
        prompts.load_state_dict({key: learned[key] for key in prompts.state_dict()})
    nouns = tuple(meta["nouns"])
    classifier = TextClassifier(tokenizer=tokenizer, templates=templates)
    text = classifier.eval()(encoder, Vocabulary(names=nouns, is_thing=(True,) * len(nouns)), prompts=prompts)
    if meta["task_names"]:
        return {f"text_features_task{i}": embeds for i, embeds in enumerate(text.embeds.unbind(1))}
    return {"text_features": averaged(text).embeds[:, 0]}


TOPICS = {
    "denseclip/clip_text_encoder": clip_text_encoder,
    "denseclip/text_context_encoder": text_context_encoder,
    "denseclip/context_decoder": context_decoder,
    "maft/text_prompt_zsseg": sentence_prompts,
    "maft/text_prompt_freeseg": sentence_prompts,
    "ldvc_eq/deep_text_prompt": deep_text_prompt,
}
