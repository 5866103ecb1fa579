"""Residual attention and feed-forward blocks of the query decoders (DETR, arXiv 2005.12872, appendix A.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
