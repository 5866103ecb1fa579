"""Short texts: what does not fit is refused, by name and number."""

import pytest
import torch

from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.name_tokenizer import NameTokenizer, first_names
from ovseg_d2.structures import Vocabulary

TOKENIZER = clip_tokenizer("OVShapes-RN")


def test_names_keep_their_tokens():
    names = NameTokenizer(TOKENIZER, length=5, limit="")
    tokens = names(["grass", "red star"])
    assert tokens.shape == (2, 5)
    assert torch.equal(tokens, TOKENIZER(["grass", "red star"])[:, :5])
    assert names.encode("red star") == tokens[1, 1:3].tolist()


def test_longer_names_are_refused():
    names = NameTokenizer(TOKENIZER, length=3, limit="KEY 11 leaves 3")
    with pytest.raises(ValueError, match="class 'red star' has 4 tokens with SOT and EOT, but KEY 11 leaves 3"):
        names(["grass", "red star"])


def test_a_text_beyond_the_towers_places_is_refused_with_its_whole_length():
    """CLIP's tokenizer cuts it to 77 without a word."""
    names = NameTokenizer(TOKENIZER, length=77, limit="X has 77 places")
    fits = "grass " * 75
    assert names([fits]).shape == (1, 77)
    with pytest.raises(ValueError, match="has 81 tokens with SOT and EOT, but X has 77 places"):
        names([fits, "grass " * 79])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((13, 0), "A.B.CONTEXT_LENGTH is 0; expected at least 1"),
        ((10, 8), "A.B.TEXT_LENGTH is 10; expected at least CONTEXT_LENGTH \\+ 3, 11"),
        ((78, 8), "A.B.TEXT_LENGTH is 78; .* at most the 77 places of X"),
    ],
)
def test_contexts_leave_a_place_for_the_name(lengths, message):
    def beside(text_length, context_length):
        return NameTokenizer.beside_context(
            TOKENIZER,
            section="A.B",
            text_length=text_length,
            context_length=context_length,
            clip_name="X",
            places=77,
        )

    assert beside(13, 8).length == 5
    with pytest.raises(ValueError, match=message):
        beside(*lengths)


def test_the_first_name_stands_for_a_class():
    vocabulary = Vocabulary(
        names=("wardrobe", "sky"), is_thing=(True, False), synonyms=(("wardrobe, closet, press", "cupboard"), ("sky",))
    )
    assert first_names(vocabulary).synonyms == (("wardrobe",), ("sky",))
    assert first_names(vocabulary).names == vocabulary.names
