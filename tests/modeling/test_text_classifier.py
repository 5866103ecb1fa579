"""Class embeddings of vocabularies, and every way in which a kept one can go stale."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.prompts import DeepTextPrompts, LearnableContexts, SentencePrompts
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged, class_logits
from ovseg_d2.structures import TextClasses, Vocabulary
from tests.modeling.clip.tiny_text import TOKENIZER, tiny_text_model

TEMPLATES = ("a photo of a {}.", "{}", "There is a small {} in the scene")


def vocabulary_of(*classes: str, **kwargs: Any) -> Vocabulary:
    """Things, from texts with commas between synonyms."""
    synonyms = tuple(tuple(text.split(",")) for text in classes)
    names = tuple(texts[0] for texts in synonyms)
    return Vocabulary(names=names, is_thing=(True,) * len(names), synonyms=synonyms, **kwargs)


SCENE = vocabulary_of("cat,kitten,grey cat", "hot air balloon", "sky,heaven")
OTHER = vocabulary_of("bus", "cat", "very long spotted hovercraft,eel")


class Model(nn.Module):
    """A text tower and a classifier as a segmentor owns them; counts the calls of the tower."""

    def __init__(self, *, trainable: bool = False, prompts: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.text = ClipTextEncoder.from_open_clip(tiny_text_model()).requires_grad_(trainable)
        self.prompts = prompts
        self.classifier = TextClassifier(tokenizer=TOKENIZER, templates=TEMPLATES, **kwargs)
        self.calls = 0
        self.text.register_forward_hook(self._count)
        self.eval()

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, vocabulary: Vocabulary) -> TextClasses:
        return self.classifier(self.text, vocabulary, prompts=self.prompts)

    def fresh(self, vocabulary: Vocabulary) -> Tensor:
        """Embeddings that no cache has seen."""
        with torch.no_grad():
            classifier = TextClassifier(tokenizer=TOKENIZER, templates=TEMPLATES)
            return classifier(self.text, vocabulary, prompts=self.prompts).embeds


def expected_embeds(model: CLIP, vocabulary: Vocabulary) -> Tensor:
    """One text at a time, through open_clip itself."""
    rows = []
    for synonyms in vocabulary.synonyms:
        for text in synonyms:
            row = [model.encode_text(TOKENIZER([template.format(text)]), normalize=True) for template in TEMPLATES]
            rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
@pytest.mark.parametrize("vocabulary", [SCENE, OTHER])
def test_equals_open_clip_text_by_text(vocabulary, chunk_size):
    text = Model(chunk_size=chunk_size)(vocabulary)
    expected = expected_embeds(tiny_text_model(), vocabulary)
    torch.testing.assert_close(text.embeds, expected, rtol=1e-5, atol=1e-5)
    assert text.class_ids.tolist() == ([0, 0, 0, 1, 2, 2] if vocabulary is SCENE else [0, 1, 2, 2])
    assert text.embeds.dtype == torch.float32 and len(text) == 3


def test_classes_in_another_order():
    model = Model(chunk_size=2)
    a, b = model(SCENE), model(vocabulary_of("sky,heaven", "cat,kitten,grey cat", "hot air balloon"))
    torch.testing.assert_close(b.embeds, a.embeds[[4, 5, 0, 1, 2, 3]])
    assert b.class_ids.tolist() == [0, 0, 1, 1, 1, 2]


def test_short_texts_do_not_pay_for_long_ones():
    model = Model(chunk_size=6)
    lengths = []
    model.text.transformer.resblocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(vocabulary_of("cat", "sky", "an " * 30 + "eel", "bus"))
    assert lengths == [8, 40]


def test_averaged_is_a_unit_vector():
    text = Model()(SCENE)
    mean = averaged(text)
    assert mean.embeds.shape == (6, 1, 10) and mean.class_ids is text.class_ids
    torch.testing.assert_close(mean.embeds[:, 0], F.normalize(text.embeds.sum(1), dim=-1))


@pytest.mark.parametrize(
    ("trained", "vocabulary", "seen"),
    [
        (None, SCENE, [True, True, True]),
        (vocabulary_of("tiger,kitten", "sky above", "balloon"), SCENE, [True, False, False]),
        (vocabulary_of("cat"), vocabulary_of("cat", "sky", is_seen=(False, True)), [False, True]),
    ],
    ids=["no training classes", "shared synonym", "split"],
)
def test_seen(trained, vocabulary, seen):
    assert Model(trained_vocabulary=trained)(vocabulary).seen.tolist() == seen


def test_things():
    vocabulary = Vocabulary(names=("cat", "sky"), is_thing=(True, False))
    assert Model()(vocabulary).is_thing.tolist() == [True, False]


def test_class_logits_are_the_largest_of_the_entries():
    torch.manual_seed(0)
    logits, class_ids = torch.randn(2, 5, 6) - 3, torch.tensor([0, 0, 0, 1, 2, 2])
    expected = torch.stack([logits[..., :3].amax(-1), logits[..., 3], logits[..., 4:].amax(-1)], dim=-1)
    assert torch.equal(class_logits(logits, class_ids, 3), expected)
    assert torch.equal(class_logits(logits, torch.arange(6), 6), logits)


def test_no_classes():
    with pytest.raises(ValueError, match="the vocabulary has no classes"):
        Model()(Vocabulary(names=(), is_thing=()))


# ---- texts that do not fit


@pytest.mark.parametrize("can_tell", [True, False], ids=["encode", "callable"])
def test_a_text_that_is_cut_names_its_class(caplog, can_tell):
    model = Model()
    if not can_tell:
        model.classifier.tokenizer = lambda texts: TOKENIZER(texts)
    long = "an " * 80 + "eel"
    with caplog.at_level(logging.WARNING):
        text = model(Vocabulary(names=("cat", "long one"), is_thing=(True, True), synonyms=(("cat",), (long,))))
    (message,) = caplog.messages
    assert "'long one' is cut" in message and "over 77 tokens" in message
    cut = "There is a small " + "an " * 71
    expected = model.text(TOKENIZER([cut]))[0]
    torch.testing.assert_close(text.embeds[1, 2], F.normalize(expected, dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_words", "num_warnings"), [(68, 0), (69, 1)])
def test_a_text_that_just_fits_is_not_reported(caplog, num_words, num_warnings):
    model = Model(trainable=True).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # no warning at every step
            model(vocabulary_of("an " * (num_words - 1) + "eel"))  # 9 more tokens in the longest template
    assert len(caplog.messages) == num_warnings


# ---- a frozen tower


def test_a_frozen_tower_encodes_a_vocabulary_once():
    model = Model()
    for vocabulary in (SCENE, OTHER, SCENE, OTHER):
        torch.testing.assert_close(model(vocabulary).embeds, model.fresh(vocabulary))
    model.calls = 0
    model.train()(SCENE)
    model.eval()(OTHER)
    model(vocabulary_of(*(",".join(s) for s in SCENE.synonyms), is_seen=(True, False, True)))
    assert model.calls == 0


def test_only_a_few_vocabularies_are_kept():
    model = Model()
    for i in range(12):
        model(vocabulary_of(f"class {i}"))
    assert len(model.classifier._frozen) == 8
    model.calls = 0
    model(vocabulary_of("class 11"))
    assert model.calls == 0
    model(vocabulary_of("class 0"))
    assert model.calls == 1


def doubled(module: nn.Module) -> dict[str, Tensor]:
    return {key: 2 * value + 0.1 for key, value in module.state_dict().items()}


CHANGES: dict[str, Callable[[Model], Any]] = {
    "owner's load_state_dict": lambda m: m.load_state_dict(doubled(m)),
    "tower's load_state_dict": lambda m: m.text.load_state_dict(doubled(m.text)),
    "part's load_state_dict": lambda m: m.text.transformer.load_state_dict(doubled(m.text.transformer)),
    "write through .data": lambda m: m.text.ln_final.weight.data.add_(1),
    "new .data": lambda m: setattr(m.text.ln_final.weight, "data", m.text.ln_final.weight.data + 1),
    "new parameter": lambda m: setattr(m.text.ln_final, "weight", nn.Parameter(torch.rand(16))),
    "other type": lambda m: m.double(),
}


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_seen(change, trainable):
    model = Model(trainable=trainable)
    before = model(SCENE).embeds
    change(model)
    after = model(SCENE).embeds
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model.fresh(SCENE))


def test_encoded_in_inference_mode_used_in_training():
    model = Model()
    with torch.inference_mode():
        model(SCENE)
    weight = nn.Parameter(torch.rand(10))
    (model.train()(SCENE).embeds * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_autocast_does_not_get_into_the_cache(trainable):
    model = Model(trainable=trainable)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = model(SCENE).embeds
    assert torch.equal(embeds, model.fresh(SCENE))


# ---- trainable parts


def test_nothing_is_kept_in_training():
    model = Model(trainable=True).train()
    a, b = model(SCENE), model(SCENE)
    assert model.calls == 2 and a.embeds is not b.embeds
    b.embeds[:, :, 0].sum().backward()
    assert model.text.transformer.resblocks[0].attn.in_proj_weight.grad.abs().sum() > 0


def test_one_result_is_kept_in_evaluation():
    model = Model(trainable=True)
    assert model(SCENE).embeds is model(SCENE).embeds and model.calls == 1
    assert not model(SCENE).embeds.requires_grad
    model(OTHER)
    model(SCENE)
    assert model.calls == 3


@pytest.mark.parametrize("switch_modes", [True, False], ids=["train and eval", "eval throughout"])
@pytest.mark.parametrize("fused", [True, False])
def test_training_then_evaluating_two_vocabularies(fused, switch_modes):
    model = Model(trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    evaluated = []
    for _ in range(2):
        model.train()
        loss = model(SCENE).embeds[..., 0].sum()
        model.train(not switch_modes).eval()
        if not switch_modes:
            model(SCENE), model(OTHER)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # after which "eval throughout" has seen no change of mode
        for vocabulary in (SCENE, OTHER):
            evaluated.append(model(vocabulary).embeds)
            torch.testing.assert_close(evaluated[-1], model.fresh(vocabulary))
    assert not torch.equal(evaluated[0], evaluated[2])


@pytest.mark.parametrize(
    "prompts",
    [
        LearnableContexts(num_contexts=2, length=3, dim=16),
        LearnableContexts(num_contexts=2, length=3, dim=16, num_classes=4),
        DeepTextPrompts(num_layers=2, num_tokens=3, dim=16),
        SentencePrompts(dim=16, prefix=2, full_stop=269),
    ],
    ids=["contexts", "contexts of classes", "deep", "sentence"],
)
def test_prompts_before_a_frozen_tower(prompts):
    model = Model(prompts=prompts, chunk_size=4).train()
    optimizer = torch.optim.AdamW(prompts.parameters(), lr=0.1, fused=True)
    num_contexts = 2 if isinstance(prompts, LearnableContexts) else 1
    embeds = model(SCENE).embeds
    assert embeds.shape == (6, 3 * num_contexts, 10)
    # Synonym 1 of class 0 in template 2.
    alone = prompts(model.text, TOKENIZER([TEMPLATES[2].format("kitten")]), class_ids=torch.tensor([0]))
    alone = F.normalize(alone[:, 0], dim=-1)
    torch.testing.assert_close(embeds[1, 2 * num_contexts :], alone, rtol=1e-5, atol=1e-5)

    before = model.eval()(SCENE).embeds
    model.train()(SCENE).embeds[..., 0].sum().backward()
    optimizer.step()
    after = model.eval()(SCENE).embeds
    assert not torch.equal(before, after) and not after.requires_grad
    torch.testing.assert_close(after, model.fresh(SCENE))
    prompts.load_state_dict(doubled(prompts))
    torch.testing.assert_close(model(SCENE).embeds, model.fresh(SCENE))
    for parameter in prompts.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(model(SCENE).embeds, model.fresh(SCENE))


# ---- on disk


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_another_process_reads_what_one_wrote(tmp_path):
    first, second = Model(cache_dir=str(tmp_path / "new")), Model(cache_dir=str(tmp_path / "new"))
    embeds = first(SCENE).embeds
    assert only_file(tmp_path / "new").suffix == ".safetensors"
    with torch.inference_mode():
        again = second(SCENE).embeds
    assert torch.equal(again, embeds) and second.calls == 0 and not again.is_inference()


def test_other_weights_other_texts_other_file(tmp_path):
    model = Model(cache_dir=str(tmp_path))
    for i, change in enumerate((lambda: None, lambda: model.load_state_dict(doubled(model)))):
        change()
        for j, vocabulary in enumerate((SCENE, OTHER), start=1):
            torch.testing.assert_close(model(vocabulary).embeds, model.fresh(vocabulary))
            assert len(list(tmp_path.iterdir())) == 2 * i + j


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda c: c[:-9], flip_last_byte, lambda c: b"", lambda c: b"\xff" * 50])
def test_a_damaged_file_is_made_anew(tmp_path, caplog, damage):
    embeds = Model(cache_dir=str(tmp_path))(SCENE).embeds
    path = only_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with caplog.at_level(logging.WARNING):
        again = Model(cache_dir=str(tmp_path))(SCENE).embeds
    assert torch.equal(again, embeds) and only_file(tmp_path).read_bytes() == content
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0] and "made anew" in caplog.messages[0]


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        model = Model(cache_dir=str(tmp_path / "file"))
        assert torch.equal(model(SCENE).embeds, model.fresh(SCENE))
    assert "cannot be written" in caplog.messages[-1]


def test_trainable_parts_leave_no_file(tmp_path):
    Model(trainable=True, cache_dir=str(tmp_path))(SCENE)
    Model(prompts=LearnableContexts(num_contexts=1, length=2, dim=16), cache_dir=str(tmp_path))(SCENE)
    assert not list(tmp_path.iterdir())
