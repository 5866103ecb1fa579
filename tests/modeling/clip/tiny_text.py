"""open_clip models with a tiny text tower and random weights."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from tests.helpers import randomise

VISION = {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8}
#: CLIP's own, with its 49408 words.
TOKENIZER = SimpleTokenizer(context_length=77)


def tiny_text_model(
    *, custom: bool = False, seed: int = 0, quick_gelu: bool = True, **text_cfg: Any
) -> CLIP | CustomTextCLIP:
    """A ``CLIP``, or a ``CustomTextCLIP``, whose text tower has 2 layers of width 16 and 10 outputs."""
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2} | text_cfg
    kind = CustomTextCLIP if custom else CLIP
    return randomise(kind(embed_dim=10, vision_cfg=VISION, text_cfg=text_cfg, quick_gelu=quick_gelu), seed).eval()


def random_tokens(lengths: list[int], *, vocab_size: int, width: int, seed: int = 0) -> Tensor:
    """(B, width) texts of so many tokens with SOT and EOT, the two largest ids, and zeros behind."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size - 2, (len(lengths), width), generator=generator)
    ends = torch.tensor(lengths)[:, None] - 1
    columns = torch.arange(width)
    tokens[:, 0] = vocab_size - 2
    tokens[columns == ends] = vocab_size - 1
    tokens[columns > ends] = 0
    return tokens
