"""Class embeddings of a vocabulary: synonyms x templates through CLIP's text tower, and the only cache of them.

What is kept, and for how long:

* A **frozen** tower (no parameter with ``requires_grad``): a result belongs to the hash of the tower's weights, the
  synonyms and the templates. The last few stay in memory, in training too; with a ``cache_dir`` also on disk, where the
  key is made of the hash and the tokens. The tower takes its hash anew whenever its weights may have changed.
* **Any trainable part** (the tower, or prompts before the names): nothing in training mode, where gradients flow. In
  evaluation one result, without gradients, which ``train()``, ``load_state_dict`` and device moves drop, and which
  belongs to a fingerprint of the weights: ``Parameter._version`` alone does not see what fused optimizers and writes
  through ``.data`` change.

Results are float32 whatever autocast says, and ordinary tensors even inside ``torch.inference_mode``, so that a
vocabulary encoded in evaluation can be used in training.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.prompts import DeepTextPrompts, LearnableContexts, SentencePrompts
from ovseg_d2.modeling.clip.text_cache import cached_on_disk
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder, parameter_fingerprint
from ovseg_d2.structures import TextClasses, Vocabulary

logger = logging.getLogger(__name__)

#: Vocabularies kept in memory, tokens and a frozen tower's results: those of a training set and of the test sets.
_MAX_ENTRIES = 8


class TextClassifier(nn.Module):
    """:class:`Vocabulary` -> :class:`TextClasses`; without parameters of its own."""

    def __init__(
        self,
        *,
        tokenizer: Callable[[list[str]], Tensor],
        templates: Sequence[str],
        trained_vocabulary: Vocabulary | None = None,
        cache_dir: str = "",
        chunk_size: int = 512,
        normalise: bool = True,
    ) -> None:
        """
        Args:
            tokenizer: n texts -> (n, L) int64, [SOT, words, EOT, padding], cut to L with EOT kept.
            templates: sentences with one ``{}`` for the name.
            trained_vocabulary: the classes of the training data; None: every class counts as seen.
            cache_dir: folder for the results of a frozen tower; "": memory only.
            chunk_size: texts that go through the tower at once.
            normalise: False: embeddings of the length that the tower gives them (DenseCLIP, MTA-CLIP).
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.templates = tuple(templates)
        self.trained_vocabulary = trained_vocabulary
        self.cache_dir = cache_dir
        self.chunk_size = chunk_size
        self.normalise = normalise
        self._tokenised: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._frozen: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._trainable: tuple[Hashable, Tensor] | None = None

    def forward(
        self,
        encoder: ClipTextEncoder,
        vocabulary: Vocabulary,
        *,
        prompts: LearnableContexts | DeepTextPrompts | SentencePrompts | None = None,
    ) -> TextClasses:
        """Embed all synonyms of a vocabulary in all templates, behind learned prompts if there are any.

        Returns:
            Class embeddings on the encoder's device; P is the number of templates, times that of contexts or tasks.

        Raises:
            ValueError: a vocabulary without classes, or with more than contexts were learned for.
        """
        if not len(vocabulary):
            raise ValueError("the vocabulary has no classes; expected at least one")
        device = encoder.positional_embedding.device
        return TextClasses(
            embeds=self._embeds(encoder, vocabulary, prompts),
            class_ids=torch.tensor(_class_ids(vocabulary), device=device),
            is_thing=torch.tensor(vocabulary.is_thing, dtype=torch.bool, device=device),
            seen=torch.tensor(vocabulary.seen_in(self.trained_vocabulary), dtype=torch.bool, device=device),
        )

    def train(self, mode: bool = True) -> TextClassifier:
        self._trainable = None
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._trainable = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> TextClassifier:
        self._trainable = None
        self._frozen.clear()
        return super()._apply(*args, **kwargs)

    def _embeds(self, encoder: ClipTextEncoder, vocabulary: Vocabulary, prompts: nn.Module | None) -> Tensor:
        """(E, P, D) unit vectors (with ``normalise``), from the cache where it has them."""
        parts = [encoder] if prompts is None else [encoder, prompts]
        trainable = any(parameter.requires_grad for part in parts for parameter in part.parameters())
        if trainable and self.training:
            return self._encode(encoder, vocabulary, self._tokens(encoder, vocabulary), prompts)
        position = encoder.positional_embedding
        key = (
            encoder.fingerprint() if trainable else encoder.weights_hash(),
            None if prompts is None else parameter_fingerprint(prompts),
            (vocabulary.synonyms, self.templates, position.device, position.dtype),
        )
        if trainable:
            if self._trainable is None or self._trainable[0] != key:
                self._trainable = None  # the old result need not stay beside the new one
                self._trainable = key, self._encode_without_grad(encoder, vocabulary, prompts)
            return self._trainable[1]
        return _remembered(self._frozen, key, lambda: self._encode_without_grad(encoder, vocabulary, prompts))

    # Not inference_mode: its tensors could not be used in training. Autocast would make the cache depend on it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode_without_grad(
        self, encoder: ClipTextEncoder, vocabulary: Vocabulary, prompts: nn.Module | None
    ) -> Tensor:
        """(E, P, D) for a cache; through the disk where only a frozen tower makes them."""
        device = encoder.positional_embedding.device
        tokens = self._tokens(encoder, vocabulary)

        def encode() -> Tensor:
            with torch.autocast(device.type, enabled=False):
                return self._encode(encoder, vocabulary, tokens, prompts)

        trainable = any(parameter.requires_grad for parameter in encoder.parameters())
        if not self.cache_dir or trainable or prompts is not None or not self.normalise:
            return encode()
        return cached_on_disk(encode, self.cache_dir, weights_hash=encoder.weights_hash(), tokens=tokens).to(device)

    def _tokens(self, encoder: ClipTextEncoder, vocabulary: Vocabulary) -> Tensor:
        """(E, P, L) int64 on the encoder's device."""
        tokens = _remembered(self._tokenised, vocabulary.synonyms, lambda: self._tokenise(vocabulary))
        return tokens.to(encoder.positional_embedding.device)

    def _tokenise(self, vocabulary: Vocabulary) -> Tensor:
        """(E, P, L) int64; logs the classes whose texts are cut."""
        texts, names = [], []
        for name, synonyms in zip(vocabulary.names, vocabulary.synonyms, strict=True):
            for synonym in synonyms:
                texts += [template.replace("{}", synonym) for template in self.templates]
                names += [name] * len(self.templates)
        tokens = self.tokenizer(texts)
        # A text that fills all places is either cut or just fits.
        full = (tokens.argmax(dim=1) == tokens.shape[1] - 1).nonzero().flatten().tolist()
        for name in dict.fromkeys(names[i] for i in full if _is_cut(self.tokenizer, texts[i], tokens.shape[1])):
            logger.warning("class %r is cut: with a template its text has over %d tokens", name, tokens.shape[1])
        return tokens.unflatten(0, (-1, len(self.templates)))

    def _encode(
        self, encoder: ClipTextEncoder, vocabulary: Vocabulary, tokens: Tensor, prompts: nn.Module | None
    ) -> Tensor:
        """(E, P, L) tokens -> (E, P', D) float32, unit vectors or not, in chunks of texts of like length."""
        texts = tokens.flatten(0, 1)
        class_ids = torch.tensor(_class_ids(vocabulary), device=tokens.device).repeat_interleave(tokens.shape[1])
        order = texts.argmax(dim=1).argsort(stable=True)
        chunks = []
        for rows in order.split(self.chunk_size):
            if prompts is None:
                embeds = encoder(texts[rows])[None]
            else:
                embeds = prompts(encoder, texts[rows], class_ids=class_ids[rows])
            chunks.append(F.normalize(embeds.float(), dim=-1) if self.normalise else embeds.float())
        embeds = torch.cat(chunks, dim=1)[:, order.argsort()]
        # (contexts, E * templates, D) -> (E, templates * contexts, D)
        return embeds.unflatten(1, tokens.shape[:2]).permute(1, 2, 0, 3).flatten(1, 2)


def averaged(text_classes: TextClasses) -> TextClasses:
    """The same classes with P = 1: the mean over the prompts, a unit vector again (CLIP's prompt ensemble)."""
    embeds = F.normalize(text_classes.embeds.mean(dim=1, keepdim=True), dim=-1)
    return replace(text_classes, embeds=embeds)


def class_logits(entry_logits: Tensor, class_ids: Tensor, num_classes: int) -> Tensor:
    """The largest logit of each class's entries.

    Args:
        entry_logits: (..., E).
        class_ids: (E,) int64 in [0, K), ascending; every class has an entry.

    Returns:
        (..., K).
    """
    if len(class_ids) == num_classes:
        return entry_logits
    shape = (*entry_logits.shape[:-1], num_classes)
    index = class_ids.expand(entry_logits.shape)
    return entry_logits.new_zeros(shape).scatter_reduce(-1, index, entry_logits, "amax", include_self=False)


def _class_ids(vocabulary: Vocabulary) -> list[int]:
    """The class of each entry."""
    return [i for i, synonyms in enumerate(vocabulary.synonyms) for _ in synonyms]


def _is_cut(tokenizer: Callable[[list[str]], Tensor], text: str, length: int) -> bool:
    """Whether a text that fills ``length`` places needs more; yes for a tokenizer that cannot tell."""
    encode = getattr(tokenizer, "encode", None)
    return encode is None or len(encode(text)) + 2 > length


def _remembered(kept: OrderedDict[Hashable, Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``kept[key]``, made if it is not there; the least used ones have to go."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > _MAX_ENTRIES:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
