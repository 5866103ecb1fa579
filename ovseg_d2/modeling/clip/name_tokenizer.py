"""Class names for a text tower that is run over a few tokens, with learned contexts before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ovseg_d2.structures import Vocabulary


class NameTokenizer:
    """A tokenizer of short texts, which refuses what others cut: a class would lose a part of its name."""

    def __init__(self, tokenizer: Callable[[list[str]], Tensor], *, length: int, limit: str) -> None:
        """
        Args:
            tokenizer: n texts -> (n, L) int64, [SOT, words, EOT, padding].
            length: tokens of a name with SOT and EOT, at most L.
            limit: what says so, for errors: a key with its value.
        """
        self.tokenizer = tokenizer
        self.length = length
        self.limit = limit

    @classmethod
    def beside_context(
        cls,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        section: str,
        text_length: int,
        context_length: int,
        clip_name: str,
        places: int,
    ) -> NameTokenizer:
        """For names behind a learned context.

        Args:
            section: of the config, with ``TEXT_LENGTH`` and ``CONTEXT_LENGTH``, for errors.
            text_length: tokens of a text with its context, SOT and EOT.
            context_length: vectors of the context.
            clip_name, places: the text tower, for errors, and what it has.

        Raises:
            ValueError: no context, or no place for it beside a name of one token.
        """
        if context_length < 1:
            raise ValueError(f"{section}.CONTEXT_LENGTH is {context_length}; expected at least 1")
        if not context_length + 3 <= text_length <= places:
            raise ValueError(
                f"{section}.TEXT_LENGTH is {text_length}; expected at least CONTEXT_LENGTH + 3, {context_length + 3}, "
                f"and at most the {places} places of {clip_name}"
            )
        length = text_length - context_length
        limit = f"{section}.TEXT_LENGTH {text_length} leaves {length} beside a context"
        return cls(tokenizer, length=length, limit=limit)

    def __call__(self, names: Sequence[str]) -> Tensor:
        """n names -> (n, length) int64.

        Raises:
            ValueError: a name has more tokens.
        """
        tokens = self.tokenizer(list(names))
        counts = (tokens.argmax(dim=1) + 1).tolist()
        for name, count in zip(names, counts, strict=True):
            if count == tokens.shape[1]:
                count = len(self.encode(name)) + 2  # before the tokenizer cut it
            if count > self.length:
                raise ValueError(f"class {name!r} has {count} tokens with SOT and EOT, but {self.limit}")
        return tokens[:, : self.length]

    def encode(self, name: str) -> list[int]:
        """The tokens of the words; of a tokenizer that cuts texts and cannot tell, those that are left."""
        encode = getattr(self.tokenizer, "encode", None)
        if encode is not None:
            return encode(name)
        tokens = self.tokenizer([name])[0]
        return tokens[1 : int(tokens.argmax())].tolist()


def first_names(vocabulary: Vocabulary) -> Vocabulary:
    """The same classes with one text each, whatever synonyms their dataset lists.

    Some lists have all names of a class in one, with commas between ("wardrobe, closet, press" in ADE20K's).
    """
    texts = tuple((synonyms[0].partition(",")[0].strip(),) for synonyms in vocabulary.synonyms)
    return replace(vocabulary, synonyms=texts)
