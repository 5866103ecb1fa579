"""Masked-attention decoder of Mask2Former (arXiv 2112.01527, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.attention import MLP, ResidualAttention, ResidualFFN
from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding
from ovseg_d2.structures import MaskProposals, TextClasses


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward: in this order (section 3.2.3)."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, pre_norm: bool) -> None:
        super().__init__()
        self.cross_attn = ResidualAttention(dim=dim, num_heads=num_heads, pre_norm=pre_norm)
        self.self_attn = ResidualAttention(dim=dim, num_heads=num_heads, pre_norm=pre_norm)
        self.ffn = ResidualFFN(dim=dim, ffn_dim=ffn_dim, pre_norm=pre_norm)

    def forward(
        self,
        x: Tensor,
        x_pos: Tensor,
        memory: Tensor,
        memory_with_pos: Tensor,
        blocked: Tensor,
        *,
        self_blocked: Tensor | None = None,
    ) -> Tensor:
        """x, x_pos: (N, Q, C); memory, memory_with_pos: (N, L, C); blocked: (N, Q, L) bool; self_blocked: (1, Q, Q)
        bool -> (N, Q, C)."""
        x = self.cross_attn(x, x_pos, memory=memory, memory_with_pos=memory_with_pos, blocked=blocked)
        x = self.self_attn(x, x_pos, blocked=self_blocked)
        return self.ffn(x)


def blocked_positions(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a query's own mask is background (equation 3).

    Args:
        mask_logits: (N, Q, h, w).
        size: (h', w') of the feature map to be attended.

    Returns:
        (N, Q, h' * w') bool, True where the resized probability is below 0.5; no gradient.
    """
    resized = F.interpolate(mask_logits.detach(), size=size, mode="bilinear", align_corners=False)
    return (resized < 0).flatten(2)


def unblock_empty_rows(blocked: Tensor) -> Tensor:
    """Let queries whose mask is empty look everywhere (public implementation; the paper does not mention it)."""
    return blocked & ~blocked.all(dim=-1, keepdim=True)


def separate_groups(num_first: int, num_second: int, device: torch.device) -> Tensor:
    """Which of two groups of queries are strangers: (1, Q, Q) bool, Q their sum, True between the groups."""
    second = torch.arange(num_first + num_second, device=device) >= num_first
    return (second[:, None] != second)[None]


class MaskedAttentionDecoder(nn.Module):
    """Learned queries attend to feature maps within their own masks; each layer's queries predict masks and classes.

    Texts can stand among the queries (MTA-CLIP, section 3.2, equations 2 to 4). They have no masks, and so look at the
    whole of the feature maps.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        dim: int,
        mask_dim: int,
        class_head: nn.Module | None,
        num_queries: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        num_scales: int = 3,
        pre_norm: bool = False,
        enforce_input_proj: bool = False,
        separate_texts: bool = False,
    ) -> None:
        """
        Args:
            in_dim: channels of the feature maps; projected to ``dim`` if they differ or ``enforce_input_proj`` is set.
            class_head: queries, masks, per-pixel features and classes -> class logits (``class_heads.py``);
                None for masks without classes.
            num_scales: feature maps, which the layers use in turn.
            separate_texts: texts and queries attend to themselves, not to each other (MTA-CLIP, Table 4).
        """
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim=dim, num_heads=num_heads, ffn_dim=ffn_dim, pre_norm=pre_norm) for _ in range(num_layers)
        )
        self.query_feat = nn.Embedding(num_queries, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(num_scales, dim)
        project = in_dim != dim or enforce_input_proj
        self.input_proj = nn.ModuleList(
            nn.Conv2d(in_dim, dim, 1) if project else nn.Identity() for _ in range(num_scales)
        )
        self.separate_texts = separate_texts
        self.position_encoding = SinePositionEncoding(dim=dim)
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_embed = class_head  # so it is called in public checkpoints
        self.mask_embed = MLP(in_dim=dim, hidden_dim=dim, out_dim=mask_dim, num_layers=3)
        if project:
            for conv in self.input_proj:
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)

    def forward(
        self,
        multi_scale: Sequence[Tensor],
        mask_features: Tensor,
        text: TextClasses | None = None,
        *,
        text_queries: Tensor | None = None,
    ) -> MaskProposals:
        """
        Args:
            multi_scale: ``num_scales`` maps (N, in_dim, h_i, w_i), coarsest first.
            mask_features: (N, mask_dim, h, w).
            text: classes for a class head that needs them.
            text_queries: (E, C) texts that are queries, too, the same for all images; None for none.

        Returns:
            The last layer's proposals; in training ``aux`` holds those of the initial queries and of all earlier
            layers. With ``text_queries`` each layer's have theirs.
        """
        memories, memories_with_pos, sizes = [], [], []
        for feature, project, embed in zip(multi_scale, self.input_proj, self.level_embed.weight, strict=True):
            memory = project(feature).flatten(2).transpose(1, 2) + embed
            memories.append(memory)
            memories_with_pos.append(memory + self.position_encoding(feature).flatten(2).transpose(1, 2))
            sizes.append((int(feature.shape[-2]), int(feature.shape[-1])))

        n = mask_features.shape[0]
        x = self.query_feat.weight.expand(n, -1, -1)
        x_pos = self.query_embed.weight.expand(n, -1, -1)
        proposals = self._predict(x, mask_features, text, classify=self.training or not self.layers)
        aux: list[MaskProposals] = []
        num_texts, self_blocked = 0, None
        if text_queries is not None:
            num_texts = len(text_queries)
            # Texts say themselves what they are, so they need no position.
            x = torch.cat([text_queries.to(x.dtype).expand(n, -1, -1), x], dim=1)
            x_pos = F.pad(x_pos, (0, 0, num_texts, 0))
            if self.separate_texts:
                self_blocked = separate_groups(num_texts, self.query_feat.num_embeddings, x.device)
        for i, layer in enumerate(self.layers):
            scale = i % len(memories)
            blocked = unblock_empty_rows(blocked_positions(proposals.mask_logits, sizes[scale]))
            if num_texts:
                blocked = F.pad(blocked, (0, 0, num_texts, 0))
            x = layer(x, x_pos, memories[scale], memories_with_pos[scale], blocked, self_blocked=self_blocked)
            if self.training:
                aux.append(proposals)
            classify = self.training or layer is self.layers[-1]
            proposals = self._predict(x[:, num_texts:], mask_features, text, classify=classify)
            if text_queries is not None:
                proposals.text_queries = self.decoder_norm(x[:, :num_texts])
        proposals.aux = aux
        return proposals

    def _predict(self, x: Tensor, mask_features: Tensor, text: TextClasses | None, *, classify: bool) -> MaskProposals:
        queries = self.decoder_norm(x)
        mask_logits = torch.einsum("nqc,nchw->nqhw", self.mask_embed(queries), mask_features)
        class_logits = None
        if classify and self.class_embed is not None:
            class_logits = self.class_embed(queries, mask_logits, mask_features, text)
        return MaskProposals(mask_logits=mask_logits, class_logits=class_logits, query_embeds=queries)
