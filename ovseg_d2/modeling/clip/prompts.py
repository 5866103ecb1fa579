"""Learned vectors that stand before a class name in CLIP's text tower."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder

logger = logging.getLogger(__name__)

#: Standard deviation of CLIP's own token embeddings, which CoOp, MaPLe and IVLP start from too.
INIT_STD = 0.02

KINDS = ("none", "zsseg", "freeseg")


class LearnableContexts(nn.Module):
    """P contexts of n vectors (CoOp, arXiv 2109.01134; several of them as in MTA-CLIP, section 3.2).

    The P contexts start differently: equal ones would get equal gradients for ever.
    """

    def __init__(
        self, *, num_contexts: int, length: int, dim: int, num_classes: int | None = None, std: float = INIT_STD
    ) -> None:
        """
        Args:
            length: n, vectors a context.
            dim: C, the width of the text tower.
            num_classes: contexts of their own for so many texts; None: shared by all, which any vocabulary can use.
            std: of the initial values; DenseCLIP starts from 1.
        """
        super().__init__()
        shape = (num_contexts, length, dim) if num_classes is None else (num_contexts, num_classes, length, dim)
        self.contexts = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.contexts, std=std)

    def forward(self, encoder: ClipTextEncoder, tokens: Tensor, *, class_ids: Tensor) -> Tensor:
        """
        Args:
            tokens: (B, L) int64, [SOT, words, EOT, padding].
            class_ids: (B,) int64, the class of each text; for contexts of single classes.

        Returns:
            (P, B, D), not normalised.

        Raises:
            ValueError: contexts of single classes, and a text of a class beyond them.
        """
        if self.contexts.dim() == 3:
            return encoder(tokens, contexts=self.contexts)
        num_classes = self.contexts.shape[1]
        if len(class_ids) and int(class_ids.max()) >= num_classes:
            raise ValueError(f"contexts learned for {num_classes} classes; got a text of class {int(class_ids.max())}")
        return encoder(tokens, contexts=self.contexts[:, class_ids])


class DeepTextPrompts(nn.Module):
    """n vectors for every block, in place of what the block before made of them (LDVC, section 3.3).

    They take what enters the block as it is, so the first ones hold their position embedding.
    """

    def __init__(self, *, num_layers: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(num_layers, num_tokens, dim))
        nn.init.normal_(self.prompts, std=INIT_STD)

    @torch.no_grad()
    def init_from_template(self, encoder: ClipTextEncoder, tokens: Tensor) -> None:
        """Take the states of a template in the frozen tower: prompts and name then embed as template and name do.

        A template of fewer words than prompts fills the places next to the name; the others keep their random values.

        Args:
            tokens: (1, L) int64, [SOT, template, EOT, padding].

        Raises:
            ValueError: a template of more words than there are prompts.
        """
        num_words = int(tokens[0].argmax()) - 1
        num_prompts = self.prompts.shape[1]
        if num_words > num_prompts:
            raise ValueError(f"a template of {num_words} tokens for {num_prompts} deep text prompts; at most as many")
        if num_words < num_prompts:
            logger.warning(
                "a template of %d tokens for %d deep text prompts: the first %d keep their random values",
                *(num_words, num_prompts, num_prompts - num_words),
            )
        states = encoder.block_inputs(tokens[:, : num_words + 1])[:, 0, 1:]
        self.prompts[:, num_prompts - num_words :] = states.to(self.prompts)

    def forward(self, encoder: ClipTextEncoder, tokens: Tensor, *, class_ids: Tensor | None = None) -> Tensor:
        """(B, L) int64 tokens -> (1, B, D) embeddings, not normalised; all classes share the prompts."""
        return encoder(tokens, deep_prompts=self.prompts)[None]


def template_tokens(clip_name: str, template: str, *, num_tokens: int, key: str) -> Tensor:
    """A template as :meth:`DeepTextPrompts.init_from_template` takes it, on the CPU, checked before there are weights.

    Args:
        template: what stands before the name, "this is a photo of a".
        num_tokens: how many prompts there are.
        key: of the config that holds the template, for errors.

    Returns:
        (1, L) int64.

    Raises:
        ValueError: a place for the name in it, or more tokens than prompts.
    """
    if "{" in template:
        raise ValueError(f"{key} is {template!r}; expected the words before the name alone, without '{{}}'")
    with torch.device("cpu"):  # models are built on the meta device, too
        tokens = clip_tokenizer(clip_name)([template])
    num_words = int(tokens[0].argmax()) - 1
    if num_words > num_tokens:
        raise ValueError(
            f"{key} is {template!r}, {num_words} tokens for {num_tokens} deep text prompts; expected at most as many"
        )
    return tokens


class SentencePrompts(nn.Module):
    """Learned vectors on both sides of the name, with a full stop (ZSSeg, arXiv 2112.14757, section 3.3), and those of
    a task in front of the sentence (FreeSeg, arXiv 2303.17225, section 3.3).

    The sequence is [task's name, task vectors, SOT, prefix, name, suffix, full stop, EOT].
    """

    def __init__(
        self,
        *,
        dim: int,
        prefix: int,
        suffix: int = 0,
        full_stop: int,
        task_prompts: int = 0,
        task_tokens: Sequence[Sequence[int]] = (),
    ) -> None:
        """
        Args:
            prefix, suffix: number of vectors before and behind the name.
            full_stop: the token id of ".".
            task_prompts: number of vectors, the same for all tasks.
            task_tokens: the token ids of each task's name; empty for a model without tasks.
        """
        super().__init__()
        self.prefix_prompt = nn.Parameter(INIT_STD * torch.randn(prefix, dim))
        self.suffix_prompt = nn.Parameter(INIT_STD * torch.randn(suffix, dim)) if suffix else None
        self.task_prompt = nn.Parameter(torch.empty(task_prompts, dim)) if task_prompts else None
        if self.task_prompt is not None:
            nn.init.kaiming_uniform_(self.task_prompt, a=2)  # FreeSeg's
        self.full_stop = full_stop
        self.task_tokens = tuple(tuple(tokens) for tokens in task_tokens) or ((),)

    def forward(self, encoder: ClipTextEncoder, tokens: Tensor, *, class_ids: Tensor | None = None) -> Tensor:
        """(B, L) int64 tokens -> (P, B, D) embeddings, not normalised; P tasks, one if there are none.

        The public FreeSeg remembers features of frozen prompts by the class's name alone, so that all tasks get those
        of the first one; here each has its own.
        """
        ends = tokens.argmax(dim=1)
        marks = torch.stack([tokens[0, 0], tokens.new_tensor(self.full_stop), tokens[0].max()])
        start, stop, end = encoder.token_embedding(marks)
        tail = [stop[None], end[None]]
        if self.suffix_prompt is not None:
            tail.insert(0, self.suffix_prompt)
        words = encoder.token_embedding(tokens[:, 1:])
        embeds = []
        for task in self.task_tokens:
            head = [start[None], self.prefix_prompt]
            if self.task_prompt is not None:
                head.insert(0, self.task_prompt)
            head.insert(0, encoder.token_embedding(tokens.new_tensor(task)))
            embeds.append(encoder.forward_embedded(*_sentences(torch.cat(head), words, ends - 1, torch.cat(tail))))
        return torch.stack(embeds)


def _sentences(head: Tensor, words: Tensor, num_words: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Join (h, C) before, the first (B,) of (B, n, C), and (t, C) behind: (B, L, C) and (B,) the last place of each."""
    parts = torch.cat([head.expand(len(words), -1, -1), words, tail.expand(len(words), -1, -1)], dim=1)
    last = len(head) + num_words + len(tail) - 1
    place = torch.arange(parts.shape[1], device=words.device).expand(len(words), -1)
    skipped = words.shape[1] - num_words[:, None]
    source = torch.where(place < len(head) + num_words[:, None], place, place + skipped).clamp(max=parts.shape[1] - 1)
    return parts.gather(1, source[..., None].expand(-1, -1, parts.shape[2])), last


def build_sentence_prompts(cfg: CfgNode, clip: Clip) -> SentencePrompts | None:
    """The prompts that ``MODEL.OVSEG.PROMPTS`` describes; None if it asks for none.

    They are the sentence, so the templates of the texts that they stand in must be the name alone, ``["name"]``: those
    that CLIP compares masks with, and with ``FROZEN_CLIP.QUERY_PROMPTS`` those of the generator's classifier.

    Raises:
        ValueError: no such kind, other templates, prompts that leave no place for a name, or a text tower that takes
            none.
    """
    ovseg = cfg.MODEL.OVSEG
    options = ovseg.PROMPTS
    if options.KIND not in KINDS:
        raise ValueError(f"MODEL.OVSEG.PROMPTS.KIND is {options.KIND!r}; allowed are {', '.join(KINDS)}")
    if options.KIND == "none":
        return None
    host = ovseg.FROZEN_CLIP
    templates = {"FROZEN_CLIP.REGION_TEMPLATES": host.REGION_TEMPLATES} if host.REGION_TEMPLATES else {}
    if host.QUERY_PROMPTS or not host.REGION_TEMPLATES:
        templates["TEXT.TEMPLATES"] = ovseg.TEXT.TEMPLATES
    for key, names in templates.items():
        if get_templates(names) != ("{}",):
            raise ValueError(
                f"MODEL.OVSEG.{key} is {list(names)}, but with MODEL.OVSEG.PROMPTS.KIND {options.KIND!r} the sentence "
                "around a name is learned; expected ['name']"
            )
    if not clip.text.reads_eot:
        raise ValueError(
            f"MODEL.OVSEG.PROMPTS.KIND is {options.KIND!r}, which needs a causal text tower that reads EOT; that of "
            f"{ovseg.CLIP.NAME} pools by {clip.text.pool_type!r}; expected 'none'"
        )
    with_tasks = options.KIND == "freeseg"
    if with_tasks and len(options.TASKS) not in (1, 3):
        raise ValueError(
            f"MODEL.OVSEG.PROMPTS.TASKS has {len(options.TASKS)} names; KIND 'freeseg' expects those of semantic, "
            "instance and panoptic segmentation in this order, or one for all of them"
        )
    full_stop, *task_tokens = _word_tokens(ovseg.CLIP.NAME, [".", *(options.TASKS if with_tasks else ())])
    num_task = options.TASK if with_tasks else 0
    # SOT, a name of one token, the full stop and EOT are four.
    length = max(map(len, task_tokens), default=0) + num_task + options.PREFIX + options.SUFFIX + 4
    if length > clip.text.context_length:
        raise ValueError(
            f"MODEL.OVSEG.PROMPTS: a sentence has {length} tokens with a name of one; the text tower of "
            f"{ovseg.CLIP.NAME} has {clip.text.context_length} places, lower PREFIX, SUFFIX or TASK"
        )
    return SentencePrompts(
        dim=clip.text.width,
        prefix=options.PREFIX,
        suffix=options.SUFFIX,
        full_stop=full_stop[0],
        task_prompts=num_task,
        task_tokens=task_tokens,
    )


def _word_tokens(clip_name: str, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without SOT and EOT."""
    with torch.device("cpu"):  # models are built on the meta device, too
        tokens = clip_tokenizer(clip_name)(list(texts))
    return [row[1 : int(row.argmax())].tolist() for row in tokens]
