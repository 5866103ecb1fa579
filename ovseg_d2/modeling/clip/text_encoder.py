"""CLIP's text tower (arXiv 2103.00020, section 2.4), run no further than the longest text.

A text is [SOT, words, EOT, padding]; the tower reads its state at EOT. Under the causal mask nothing behind a position
reaches it, so the positions behind the last EOT of a batch need not be computed: class names in a template take about
10 of CLIP's 77. The same holds with learned vectors between SOT and the words:

* contexts (CoOp, arXiv 2109.01134; DenseCLIP, arXiv 2112.01518, section 3.3), which pass through all blocks;
* deep prompts (LDVC), which are replaced before every block.
"""

from __future__ import annotations

import hashlib
from itertools import count

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_POOL_TYPES = ("argmax", "eos", "first", "last")
_generations = count()


class ClipTextEncoder(nn.Module):
    """The parts of an open_clip text tower under open_clip's names, with a forward of its own."""

    def __init__(
        self,
        *,
        token_embedding: nn.Embedding,
        positional_embedding: nn.Parameter,
        transformer: nn.Module,
        ln_final: nn.Module,
        text_projection: nn.Parameter | nn.Linear | None,
        causal: bool = True,
        pool_type: str = "argmax",
        eos_id: int = 2,
    ) -> None:
        """
        Args:
            positional_embedding: (L, C), L the longest text.
            transformer: with ``resblocks``, each called as ``block(x, attn_mask=mask)``, and ``batch_first``.
            text_projection: (C, D); a linear layer or nothing in some towers.
            causal: whether a position sees only those before it.
            pool_type: the position that is read: the largest token id (``argmax``, CLIP's EOT), the first ``eos_id``
                (``eos``), the ``first`` or the ``last``.
        """
        super().__init__()
        self.token_embedding = token_embedding
        self.positional_embedding = positional_embedding
        self.transformer = transformer
        self.ln_final = ln_final
        self.text_projection = text_projection
        self.causal = causal
        self.pool_type = pool_type
        self.eos_id = eos_id
        self._weights_hash: tuple[tuple, str] | None = None
        self._generation = next(_generations)

    @classmethod
    def from_open_clip(cls, model: nn.Module) -> ClipTextEncoder:
        """Take the text tower out of an open_clip ``CLIP`` or ``CustomTextCLIP``; the modules are shared, not copied.

        Raises:
            ValueError: a tower of another kind (Hugging Face, or with a class token as in CoCa).
        """
        tower = getattr(model, "text", model)
        # CLIP keeps the tower's parts as its own and puts a prefix before two of their settings.
        prefix = "text_" if tower is model else ""
        problem = None
        if not hasattr(getattr(tower, "transformer", None), "resblocks"):
            problem = f"is a {type(tower).__name__}; expected open_clip's TextTransformer"
        elif getattr(tower, "cls_emb", None) is not None:
            problem = "appends a class token"
        elif getattr(tower, "use_pad_mask", False):
            problem = "masks its padding"
        elif getattr(tower, f"{prefix}pool_type") not in _POOL_TYPES:
            problem = f"pools by {getattr(tower, f'{prefix}pool_type')!r}; expected one of {', '.join(_POOL_TYPES)}"
        if problem:
            raise ValueError(f"the text tower of this {type(model).__name__} {problem}, which is not supported")
        return cls(
            token_embedding=tower.token_embedding,
            positional_embedding=tower.positional_embedding,
            transformer=tower.transformer,
            ln_final=tower.ln_final,
            text_projection=tower.text_projection,
            causal=tower.attn_mask is not None,
            pool_type=getattr(tower, f"{prefix}pool_type"),
            eos_id=getattr(tower, f"{prefix}eos_id"),
        )

    @property
    def width(self) -> int:
        """C, the width of the tower."""
        return self.positional_embedding.shape[1]

    @property
    def embed_dim(self) -> int:
        """D, the dimension of the embeddings."""
        if self.text_projection is None:
            return self.width
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection.out_features
        return self.text_projection.shape[1]

    @property
    def context_length(self) -> int:
        """The longest text, in tokens."""
        return self.positional_embedding.shape[0]

    @property
    def num_layers(self) -> int:
        return len(self.transformer.resblocks)

    @property
    def reads_eot(self) -> bool:
        """Whether the end of the text is read and sees what is before: it can be cut there, and take prompts."""
        return self.causal and self.pool_type in ("argmax", "eos")

    def forward(self, tokens: Tensor, *, contexts: Tensor | None = None, deep_prompts: Tensor | None = None) -> Tensor:
        """Embed texts.

        Args:
            tokens: (B, L) int64, [SOT, words, EOT, padding].
            contexts: (P, n, C) vectors between SOT and the words, the same for all texts, or (P, B, n, C).
            deep_prompts: (layers, n, C) what enters each block between SOT and the words, positions included.

        Returns:
            (B, D), not normalised; (P, B, D) with contexts.
        """
        ends = self._pooled_positions(tokens)
        if self.reads_eot:
            tokens = tokens[:, : int(ends.max()) + 1 if len(ends) else 1]
        states = self.token_states(tokens, contexts=contexts, deep_prompts=deep_prompts)
        # Whatever was inserted stands before the words.
        return self._read(states, ends + states.shape[-2] - tokens.shape[1])

    def forward_embedded(self, embeds: Tensor, ends: Tensor) -> Tensor:
        """Embed sequences of vectors in place of token embeddings.

        Args:
            embeds: (B, L, C), without positions.
            ends: (B,) int64, the position of EOT; what stands behind it does not count.

        Returns:
            (B, D), not normalised.
        """
        assert self.reads_eot, self.pool_type
        length = int(ends.max()) + 1
        x = embeds[:, :length].to(self.transformer.get_cast_dtype()) + self._positions(length)
        return self._read(self.ln_final(self._run_blocks(x, None)), ends)

    def token_states(
        self, tokens: Tensor, *, contexts: Tensor | None = None, deep_prompts: Tensor | None = None
    ) -> Tensor:
        """States of all positions after the last norm; arguments as in :meth:`forward`.

        Returns:
            (B, n + L, C), n = 0 without prompts; (P, B, n + L, C) with contexts.
        """
        x = self._embed(tokens, contexts, deep_prompts)
        states = self.ln_final(self._run_blocks(x.flatten(0, -3), deep_prompts))
        return states if contexts is None else states.unflatten(0, (len(contexts), len(tokens)))

    def block_inputs(self, tokens: Tensor) -> Tensor:
        """What enters each block (layers, B, L, C); at the first, token and position embedding."""
        inputs: list[Tensor] = []
        self._run_blocks(self._embed(tokens, None, None), None, inputs)
        return torch.stack(inputs)

    def fingerprint(self) -> tuple:
        """A cheap value that changes when the weights do: counts of loads, device moves and changes of mode, with
        :func:`parameter_fingerprint`."""
        return self._generation, parameter_fingerprint(self)

    def weights_hash(self) -> str:
        """SHA-256 of the tower; taken at the first call, and anew when :meth:`fingerprint` has changed."""
        fingerprint = self.fingerprint()
        if self._weights_hash is None or self._weights_hash[0] != fingerprint:
            # The same weights mean something else with another activation (OpenAI's QuickGELU) or number of heads.
            heads = [getattr(module, "num_heads", None) for module in self.modules()]
            digest = hashlib.sha256(f"{self} {heads} {self.causal} {self.pool_type} {self.eos_id}".encode())
            for name, tensor in self.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            self._weights_hash = fingerprint, digest.hexdigest()
        return self._weights_hash[1]

    def train(self, mode: bool = True) -> ClipTextEncoder:
        self._generation = next(_generations)
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._generation = next(_generations)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> ClipTextEncoder:
        self._generation = next(_generations)
        return super()._apply(*args, **kwargs)

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        """(B, L) tokens -> (B,) the position whose state is read."""
        if self.pool_type == "argmax":
            return tokens.argmax(dim=-1)
        if self.pool_type == "eos":
            return (tokens == self.eos_id).int().argmax(dim=-1)
        return tokens.new_full((len(tokens),), 0 if self.pool_type == "first" else tokens.shape[1] - 1)

    def _positions(self, length: int) -> Tensor:
        """(length, C) position embeddings."""
        if length > self.context_length:
            raise ValueError(f"a text of {length} tokens, prompts included; the tower has {self.context_length} places")
        return self.positional_embedding[:length].to(self.transformer.get_cast_dtype())

    def _read(self, states: Tensor, ends: Tensor) -> Tensor:
        """(..., B, L, C) states at (B,) positions -> (..., B, D)."""
        pooled = states.gather(-2, ends[:, None, None].expand(*states.shape[:-2], 1, states.shape[-1])).squeeze(-2)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled if self.text_projection is None else pooled @ self.text_projection

    def _embed(self, tokens: Tensor, contexts: Tensor | None, deep_prompts: Tensor | None) -> Tensor:
        """What enters the first block: (B, n + L, C), or (P, B, n + L, C) with contexts."""
        if not self.reads_eot and (contexts is not None or deep_prompts is not None):
            raise ValueError(f"text prompts need a causal tower that reads EOT; this one pools by {self.pool_type!r}")
        assert contexts is None or deep_prompts is None
        inserted = contexts if contexts is not None else deep_prompts
        length = tokens.shape[1] + (0 if inserted is None else inserted.shape[-2])
        positions = self._positions(length)
        dtype = positions.dtype
        x = self.token_embedding(tokens).to(dtype)
        if contexts is not None:
            if contexts.dim() == 3:
                contexts = contexts[:, None].expand(-1, len(tokens), -1, -1)
            start, words = (part.expand(len(contexts), -1, -1, -1) for part in (x[:, :1], x[:, 1:]))
            return torch.cat([start, contexts.to(dtype), words], dim=2) + positions
        if deep_prompts is not None:
            assert len(deep_prompts) == self.num_layers, (deep_prompts.shape, self.num_layers)
            num_prompts = deep_prompts.shape[1]
            prompts = deep_prompts[0].to(dtype).expand(len(x), -1, -1)
            return torch.cat([x[:, :1] + positions[:1], prompts, x[:, 1:] + positions[num_prompts + 1 :]], dim=1)
        return x + positions

    def _run_blocks(self, x: Tensor, deep_prompts: Tensor | None, inputs: list[Tensor] | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C) through all blocks; what enters each of them goes to ``inputs``."""
        mask = None
        if self.causal:
            mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
        sequence_first = not self.transformer.batch_first
        for index, block in enumerate(self.transformer.resblocks):
            if deep_prompts is not None and index > 0:
                prompts = deep_prompts[index].to(x.dtype).expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], prompts, x[:, 1 + prompts.shape[1] :]], dim=1)
            if inputs is not None:
                inputs.append(x)
            x = x.transpose(0, 1) if sequence_first else x
            if self.transformer.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=mask)
            x = x.transpose(0, 1) if sequence_first else x
        return x


@torch.no_grad()
def parameter_fingerprint(module: nn.Module, samples: int = 16) -> tuple:
    """Identity, place, version and some evenly spaced values of every parameter.

    The values are what shows a change that PyTorch does not count: a write through ``.data``, or a fused optimizer's.
    """
    parameters = list(module.parameters())
    if not parameters:
        return ()
    values = []
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        values.append(flat[:: max(len(flat) // samples, 1)].float())
    marks = tuple((id(p), p.data_ptr(), 0 if p.is_inference() else p._version, p.requires_grad) for p in parameters)
    return marks, tuple(torch.cat(values).tolist())
