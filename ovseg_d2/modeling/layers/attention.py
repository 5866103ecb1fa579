"""Attention and feed-forward layers; the residual ones are those of DETR (arXiv 2005.12872, appendix A.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

SCALES = ("head", "dim")


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` (same parameters), batch first, whose mask broadcasts over the heads.

    PyTorch's wants the mask once a head and turns it into floats: at 1024 x 1024 pixels that is more memory than the
    attention itself.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, blocked: Tensor | None = None) -> Tensor:
        """
        Args:
            query: (N, Q, C); key, value: (N, L, C).
            blocked: (N, Q, L) bool, True where a query must not look; None: it looks everywhere.

        Returns:
            (N, Q, C).
        """
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        allowed = None if blocked is None else ~blocked[:, None]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class ResidualAttention(nn.Module):
    """Attention of queries with a skip connection; normalised after the sum, or before when ``pre_norm``.

    Position encodings are added to queries and keys, never to values.
    """

    def __init__(self, *, dim: int, num_heads: int, pre_norm: bool = False, dropout: float = 0.0) -> None:
        """``dropout``: of the attention weights and of the update."""
        super().__init__()
        self.attn = MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        nn.init.xavier_uniform_(self.attn.out_proj.weight)

    def forward(
        self,
        x: Tensor,
        x_pos: Tensor,
        *,
        memory: Tensor | None = None,
        memory_with_pos: Tensor | None = None,
        blocked: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x, x_pos: (N, Q, C) queries and their position encoding.
            memory, memory_with_pos: (N, L, C) values and keys; None: self-attention.
            blocked: (N, Q, L) bool, True where a query must not look.

        Returns:
            (N, Q, C).
        """
        y = self.norm(x) if self.pre_norm else x
        query = y + x_pos
        if memory is None:
            update = self.attn(query, query, y, blocked=blocked)
        else:
            update = self.attn(query, memory_with_pos, memory, blocked=blocked)
        x = x + self.dropout(update)
        return x if self.pre_norm else self.norm(x)


def attention_scale(*, dim: int, num_heads: int, kind: str = "head") -> float:
    """What the products of queries and keys are multiplied with: 1 / sqrt of a head's channels, or of all ("dim")."""
    assert num_heads > 0 and dim % num_heads == 0, f"{num_heads} heads, {dim} channels"
    assert kind in SCALES, kind
    return (dim // num_heads if kind == "head" else dim) ** -0.5


class CrossAttention(nn.Module):
    """Multi-head attention with a projection each for queries, keys and values."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        bias: bool = True,
        scale: str = "head",
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        """
        Args:
            dim: C, a multiple of ``num_heads``.
            bias: of queries, keys and values; the projection of the result always has one.
            scale: see :func:`attention_scale`.
            dropout: of the result.
            weight_dropout: of the attention weights.
        """
        super().__init__()
        self.scale = attention_scale(dim=dim, num_heads=num_heads, kind=scale)
        self.num_heads = num_heads
        self.dropout, self.weight_dropout = dropout, weight_dropout
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """(N, Q, C) queries, (N, L, C) keys and values -> (N, Q, C)."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, memory), (self.v_proj, memory))
        )
        weight_dropout = self.weight_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=weight_dropout, scale=self.scale)
        return F.dropout(self.proj(out.transpose(1, 2).flatten(-2)), self.dropout, self.training)


class ResidualFFN(nn.Module):
    """Two linear layers with a ReLU between and a skip connection around."""

    def __init__(self, *, dim: int, ffn_dim: int, pre_norm: bool = False, dropout: float = 0.0) -> None:
        """``dropout``: of the hidden layer and of the update."""
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) -> (N, Q, C)."""
        y = self.norm(x) if self.pre_norm else x
        x = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(y)))))
        return x if self.pre_norm else self.norm(x)


class MLP(nn.Module):
    """Linear layers of one hidden width with ReLUs between."""

    def __init__(self, *, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
