"""Learned contexts, deep text prompts and learned sentences."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode

from ovseg_d2.modeling.clip.build import build_clip_from_config, clip_tokenizer
from ovseg_d2.modeling.clip.prompts import (
    DeepTextPrompts,
    LearnableContexts,
    SentencePrompts,
    build_sentence_prompts,
    template_tokens,
)
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from ovseg_d2.modeling.text_classifier import TextClassifier
from tests.helpers import numbered_vocabulary, randomise, tiny_cfg
from tests.modeling.clip.tiny_text import TOKENIZER, random_tokens, tiny_text_model


@pytest.fixture
def encoder() -> ClipTextEncoder:
    return ClipTextEncoder.from_open_clip(tiny_text_model()).requires_grad_(False)


def test_deep_prompts_start_as_the_template(encoder):
    prompts = DeepTextPrompts(num_layers=2, num_tokens=6, dim=16)
    prompts.init_from_template(encoder, TOKENIZER(["this is a photo of a"]))
    names = ["red star", "hovercraft", "sky"]
    expected = encoder(TOKENIZER([f"this is a photo of a {name}" for name in names]))
    torch.testing.assert_close(prompts(encoder, TOKENIZER(names))[0], expected, rtol=1e-5, atol=1e-5)


def test_deep_prompts_replace_what_a_block_made_of_them(encoder):
    torch.manual_seed(0)
    prompts = DeepTextPrompts(num_layers=2, num_tokens=3, dim=16)
    inputs = []
    encoder.transformer.resblocks[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    prompts(encoder, TOKENIZER(["red star", "sky"]))
    torch.testing.assert_close(inputs[0][:, 1:4], prompts.prompts[1].expand(2, -1, -1))


def test_a_short_template_stands_next_to_the_name(encoder, monkeypatch):
    lines = []
    monkeypatch.setattr("ovseg_d2.modeling.clip.prompts.logger.warning", lambda text, *args: lines.append(text % args))
    prompts = DeepTextPrompts(num_layers=2, num_tokens=6, dim=16)
    before = prompts.prompts.clone()
    tokens = TOKENIZER(["a photo of a"])
    prompts.init_from_template(encoder, tokens)
    assert torch.equal(prompts.prompts[:, :2], before[:, :2])
    torch.testing.assert_close(prompts.prompts[:, 2:], encoder.block_inputs(tokens)[:, 0, 1:5])
    assert lines == ["a template of 4 tokens for 6 deep text prompts: the first 2 keep their random values"]


def test_a_template_longer_than_the_prompts(encoder):
    prompts = DeepTextPrompts(num_layers=2, num_tokens=3, dim=16)
    with pytest.raises(ValueError, match="a template of 4 tokens for 3 deep text prompts"):
        prompts.init_from_template(encoder, TOKENIZER(["a photo of a"]))


def test_templates_are_checked_before_there_are_weights():
    with torch.device("meta"):
        tokens = template_tokens("OVShapes-ViT", "this is a photo of a", num_tokens=6, key="KEY")
    assert tokens.device.type == "cpu" and int(tokens[0].argmax()) == 7
    with pytest.raises(ValueError, match="KEY is 'this is a photo of a', 6 tokens for 5 deep text prompts"):
        template_tokens("OVShapes-ViT", "this is a photo of a", num_tokens=5, key="KEY")
    with pytest.raises(ValueError, match="KEY is 'a photo of a {}'; expected the words before the name alone"):
        template_tokens("OVShapes-ViT", "a photo of a {}", num_tokens=6, key="KEY")


def test_gradients_reach_the_prompts_of_every_layer_alone(encoder):
    prompts = DeepTextPrompts(num_layers=2, num_tokens=3, dim=16)
    prompts(encoder, TOKENIZER(["red star"])).square().sum().backward()
    assert (prompts.prompts.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_contexts_start_differently_and_learn(encoder):
    torch.manual_seed(0)
    module = LearnableContexts(num_contexts=3, length=4, dim=16)
    embeds = module(encoder, TOKENIZER(["red star", "sky"]), class_ids=torch.arange(2))
    assert embeds.shape == (3, 2, 10)
    assert torch.pdist(embeds[:, 0]).min() > 1e-4
    embeds.square().sum().backward()
    assert (module.contexts.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_contexts_of_single_classes(encoder):
    module = LearnableContexts(num_contexts=2, length=4, dim=16, num_classes=3)
    tokens = random_tokens([4, 6], vocab_size=49408, width=8)
    embeds = module(encoder, tokens, class_ids=torch.tensor([2, 0]))
    expected = encoder(tokens[:1], contexts=module.contexts[:, 2])
    torch.testing.assert_close(embeds[:, :1], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="contexts learned for 3 classes; got a text of class 3"):
        module(encoder, tokens, class_ids=torch.tensor([2, 3]))


@pytest.mark.parametrize("tasks", [(), ("instance segmentation.", "semantic things.")], ids=["no tasks", "tasks"])
@pytest.mark.parametrize("suffix", ["", "in the scene"])
def test_sentences_of_words_equal_the_sentence(encoder, suffix, tasks):
    def words(text: str) -> list[int]:
        return TOKENIZER.encode(text)

    def embeds(text: str) -> torch.Tensor:
        return encoder.token_embedding(torch.tensor(words(text)))

    prompts = SentencePrompts(
        dim=16,
        prefix=4,
        suffix=len(words(suffix)),
        full_stop=words(".")[0],
        task_prompts=2 if tasks else 0,
        task_tokens=[words(task) for task in tasks],
    )
    state = {"prefix_prompt": embeds("a photo of a")}
    if suffix:
        state["suffix_prompt"] = embeds(suffix)
    if tasks:
        state["task_prompt"] = embeds("please do")
    prompts.load_state_dict(state)
    names = ["red star", "sky", "very small hovercraft"]
    result = prompts(encoder, TOKENIZER(names))
    assert result.shape == (max(len(tasks), 1), 3, 10)
    for i, name in enumerate(names):
        sentence = TOKENIZER([f"a photo of a {name} {suffix}."])
        for task, embed in zip(tasks or ("",), result[:, i], strict=True):
            before = torch.tensor([words(f"{task} please do") if tasks else []], dtype=torch.long)
            expected = encoder(torch.cat([before, sentence[:, :60]], dim=1))[0]
            torch.testing.assert_close(embed, expected, rtol=1e-5, atol=1e-5)


def prompt_cfg(kind: str = "freeseg", **options: object) -> CfgNode:
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.CLIP.NAME = "OVShapes-ViT"
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["name"]
    cfg.MODEL.OVSEG.PROMPTS.KIND = kind
    for key, value in options.items():
        cfg.MODEL.OVSEG.PROMPTS[key] = value
    return cfg


def built(cfg: CfgNode) -> SentencePrompts | None:
    return build_sentence_prompts(cfg, build_clip_from_config(cfg))


def test_prompts_of_the_config():
    assert built(prompt_cfg("none")) is None
    prompts = built(prompt_cfg("zsseg", SUFFIX=2))
    assert {name: tuple(p.shape) for name, p in prompts.named_parameters()} == {
        "prefix_prompt": (16, 128),
        "suffix_prompt": (2, 128),
    }
    assert prompts.task_tokens == ((),)
    prompts = built(prompt_cfg("freeseg"))
    assert {name: tuple(p.shape) for name, p in prompts.named_parameters()} == {
        "prefix_prompt": (16, 128),
        "task_prompt": (8, 128),
    }
    # Kaiming's uniform distribution, a = 2: limits sqrt(6 / (5 * 128)).
    limit = (6 / (5 * 128)) ** 0.5
    assert 0.9 * limit < prompts.task_prompt.abs().max() <= limit
    words = clip_tokenizer("OVShapes-ViT").encode
    assert prompts.task_tokens == tuple(tuple(words(task)) for task in prompt_cfg().MODEL.OVSEG.PROMPTS.TASKS)
    assert prompts.full_stop == words(".")[0]


def test_frozen_prompts_keep_the_tasks_apart():
    cfg = prompt_cfg("freeseg", PREFIX=2, TASK=2, TASKS=["all.", "instances.", "stuff."])
    clip = build_clip_from_config(cfg)
    randomise(clip.text)
    prompts = randomise(build_sentence_prompts(cfg, clip), 1).requires_grad_(False)
    classifier = TextClassifier(tokenizer=clip_tokenizer("OVShapes-ViT"), templates=["{}"]).eval()
    vocabulary = numbered_vocabulary(3, 3)
    first, again = (classifier(clip.text, vocabulary, prompts=prompts).embeds for _ in range(2))
    assert first.shape == (3, 3, 128) and first.equal(again)
    assert (first[:, 0] - first[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "coop"}, "PROMPTS.KIND is 'coop'; allowed are none, zsseg, freeseg"),
        ({"TASKS": ["a.", "b."]}, "PROMPTS.TASKS has 2 names; KIND 'freeseg' expects"),
        ({"PREFIX": 70}, "a sentence has 96 tokens with a name of one; the text tower of OVShapes-ViT has 77 places"),
    ],
)
def test_wrong_prompts(options, message):
    with pytest.raises(ValueError, match=message) as error:
        built(prompt_cfg(**options))
    assert "\n" not in str(error.value)


def test_templates_beside_learned_sentences():
    cfg = prompt_cfg()
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["vild"]
    with pytest.raises(ValueError, match=r"TEXT.TEMPLATES is \['vild'\], .* expected \['name'\]"):
        built(cfg)
    # ZSSeg on VOC: a fixed sentence for the generator, the learned one for CLIP.
    cfg.MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES = ["{}"]
    with pytest.raises(ValueError, match=r"TEXT.TEMPLATES is \['vild'\]"):
        built(cfg)
    cfg.MODEL.OVSEG.FROZEN_CLIP.QUERY_PROMPTS = False
    assert built(cfg) is not None
    cfg.MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES = ["single"]
    with pytest.raises(ValueError, match=r"FROZEN_CLIP.REGION_TEMPLATES is \['single'\]"):
        built(cfg)
