"""Self-attention of pixels within the windows that are most like their own (LDVC, arXiv 2403.08426, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.attention import SCALES, attention_scale
from ovseg_d2.modeling.layers.windows import from_windows, to_windows

FORMS = ("auto", "gather", "dense")
#: "auto" gathers where at most this share of the windows is attended to: above, one masked attention is no slower.
GATHERED_SHARE = 0.125
#: Numbers that are gathered at a time on CPUs where no gradient is wanted, so that they stay in the cache.
CHUNK_ELEMENTS = 2**20


class LocalConsensusAttention(nn.Module):
    """LCSA: the pixels of a window attend to those of the ``top_k`` windows with the most similar mean (equations 8 to
    12), its own among them only if it is one of these.

    Windows at the right and the bottom may be cut by the border: their mean is over the pixels that they have. With
    no fewer ``top_k`` than windows this is plain self-attention.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int = 8,
        window_size: int = 4,
        top_k: int = 16,
        scale: str = "head",
        form: str = "auto",
    ) -> None:
        """
        Args:
            dim: C, a multiple of ``num_heads``.
            num_heads: of the attention.
            window_size: n, side of a window in pixels.
            top_k: m, windows that a window attends to (table 8); 0: all, that is no routing at all.
            scale: of the products of queries and keys, see :func:`attention_scale`.
            form: "gather" copies the keys and values of the chosen windows, "dense" masks the attention of all pixels;
                both give the same. "auto" takes the faster one.

        Raises:
            ValueError: heads that do not divide the channels, an empty window, a negative ``top_k``, or an unknown
                scale or form.
        """
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"MODEL.OVSEG.LDVC.HEADS is {num_heads}; expected a divisor of {dim}, CLIP's width")
        if scale not in SCALES:
            raise ValueError(f"MODEL.OVSEG.LDVC.SCALE is {scale!r}; expected one of {list(SCALES)}")
        if window_size < 1:
            raise ValueError(f"MODEL.OVSEG.LDVC.WINDOW_SIZE is {window_size}; expected 1 or more pixels")
        if top_k < 0:
            raise ValueError(f"MODEL.OVSEG.LDVC.TOP_K is {top_k}; expected a number of windows, or 0 for all")
        if form not in FORMS:
            raise ValueError(f"MODEL.OVSEG.LDVC.FORM is {form!r}; expected one of {list(FORMS)}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.top_k = top_k
        self.scale = attention_scale(dim=dim, num_heads=num_heads, kind=scale)
        self.form = form
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    @torch.no_grad()
    def route(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, h, w, C).

        Returns:
            (N, windows, m) int64, for each window the ``top_k`` with the largest product of means (all if there are
            fewer), most similar first; windows are counted row by row. No gradient passes through the choice.
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            means = F.avg_pool2d(
                x.float().permute(0, 3, 1, 2), self.window_size, ceil_mode=True, count_include_pad=False
            )
            means = means.flatten(2)
            similarity = means.mT @ means
        num_windows = similarity.shape[-1]
        return similarity.topk(min(self.top_k or num_windows, num_windows), dim=-1).indices

    def forward(self, x: Tensor) -> Tensor:
        """(N, h, w, C) normalised features -> their update, of the same shape."""
        size = (x.shape[1], x.shape[2])
        num_windows = self.num_windows(size)
        qkv = self.qkv(x)
        if not 0 < self.top_k < num_windows:
            return self.out(self._dense_attention(qkv, None))
        chosen = self.route(x)
        gather = self.form == "gather" or (self.form == "auto" and self.top_k <= GATHERED_SHARE * num_windows)
        return self.out(
            self._gathered_attention(qkv, chosen)
            if gather
            else self._dense_attention(qkv, self._allowed(chosen, size)[:, None])
        )

    def num_windows(self, size: tuple[int, int]) -> int:
        """Of a map of ``size`` (h, w)."""
        return -(-size[0] // self.window_size) * -(-size[1] // self.window_size)

    def _allowed(self, chosen: Tensor, size: tuple[int, int]) -> Tensor:
        """Chosen windows (N, windows, m) -> (N, h * w, h * w) bool, whether a pixel looks at another."""
        num_windows = chosen.shape[1]
        attended = torch.zeros(len(chosen), num_windows, num_windows, dtype=torch.bool, device=chosen.device)
        attended.scatter_(-1, chosen, True)
        rows, columns = (torch.arange(length, device=chosen.device) // self.window_size for length in size)
        window = (rows[:, None] * -(-size[1] // self.window_size) + columns).flatten()
        return attended[:, window][:, :, window]

    def _dense_attention(self, qkv: Tensor, allowed: Tensor | None) -> Tensor:
        """(N, h, w, 3C) and (N, 1, h * w, h * w) bool, or None for everything -> (N, h, w, C)."""
        q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
        return out.transpose(1, 2).flatten(-2).unflatten(1, qkv.shape[1:3])

    def _gathered_attention(self, qkv: Tensor, chosen: Tensor) -> Tensor:
        """(N, h, w, 3C) and the chosen windows (N, windows, m) -> (N, h, w, C).

        Windows take the place of heads in the attention, so that keys and values are copied once.
        """
        size, (n, num_windows, _) = (qkv.shape[1], qkv.shape[2]), chosen.shape
        windows = to_windows(qkv, window_size=self.window_size)  # (N * windows, L, 3C)
        windows = windows.unflatten(0, (n, num_windows)).unflatten(-1, (3, self.num_heads, -1))
        windows = windows.permute(3, 0, 4, 1, 2, 5).contiguous()
        q, k, v = windows.flatten(1, 2)  # (N * heads, windows, L, C / heads) each
        chosen = chosen.repeat_interleave(self.num_heads, dim=0)  # (N * heads, windows, m)
        inside = None
        if any(length % self.window_size for length in size):
            ones = torch.ones(1, *size, 1, dtype=torch.bool, device=q.device)
            inside = to_windows(ones, window_size=self.window_size)[..., 0]  # (windows, L)
        step = num_windows
        if q.device.type == "cpu" and not torch.is_grad_enabled():
            step = max(CHUNK_ELEMENTS // (chosen.shape[-1] * k[:, 0].numel()), 1)
        chunks = zip(q.split(step, dim=1), chosen.split(step, dim=1), strict=True)
        out = torch.cat([self._attend(x, k, v, ids, inside) for x, ids in chunks], dim=1)
        out = out.unflatten(0, (n, self.num_heads)).permute(0, 2, 3, 1, 4).flatten(-2)  # (N, windows, L, C)
        return from_windows(out.flatten(0, 1), size, window_size=self.window_size)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, inside: Tensor | None) -> Tensor:
        """
        Args:
            q: (B, some windows, L, d), B for images and heads.
            k, v: (B, windows, L, d).
            chosen: (B, some windows, m).
            inside: (windows, L) bool, False for padding; None if there is none.

        Returns:
            (B, some windows, L, d).
        """
        rows = (torch.arange(len(k), device=k.device)[:, None, None] * k.shape[1] + chosen).flatten()
        k, v = (x.flatten(0, 1).index_select(0, rows).view(*q.shape[:2], -1, q.shape[-1]) for x in (k, v))
        allowed = None if inside is None else inside[chosen].flatten(2)[:, :, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
