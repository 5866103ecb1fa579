"""Learned prompts from the files of PromptTuning and of the public models."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from ovseg_d2.modeling.clip.build import build_clip_from_config
from ovseg_d2.modeling.clip.image_prompts import build_mask_prompts
from ovseg_d2.modeling.clip.prompts import build_sentence_prompts
from tests.helpers import randomise
from tests.modeling.test_prompt_tuning import inputs, prompt_cfg


class Host(nn.Module):
    """The parts of a host that files of prompts are for, frozen, and one that they are not for."""

    def __init__(self, cfg):
        super().__init__()
        self.clip = build_clip_from_config(cfg)
        self.prompts = build_sentence_prompts(cfg, self.clip)
        self.mask_prompts = build_mask_prompts(cfg, self.clip)
        self.proposals = nn.Linear(2, 2)
        self.requires_grad_(False)


def host_cfg(kind="freeseg", depth=2, weights=""):
    cfg = prompt_cfg(kind, depth)
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = "ovshapes"
    cfg.MODEL.OVSEG.PROMPTS.WEIGHTS = str(weights)
    return cfg


def load(cfg, *, strict=False):
    host = Host(cfg)
    load_parts(host, cfg, strict=strict)
    return host


@pytest.mark.parametrize(("kind", "depth"), [("zsseg", 0), ("freeseg", 0), ("none", 2), ("freeseg", 2)])
def test_a_checkpoint_of_prompt_tuning(tmp_path, kind, depth):
    tuned = randomise(build_model(prompt_cfg(kind, depth)), 5)
    path = tmp_path / "model_final.pth"
    save_atomic(tuned.state_dict(), path)
    host = load(host_cfg(kind, depth, path))
    for part in ("prompts", "mask_prompts"):
        source = getattr(tuned, part)
        for name, value in source.state_dict().items() if source is not None else ():
            assert getattr(host, part).state_dict()[name].equal(value)
    # CLIP comes from its own file, not from that of the prompts.
    token = "clip.visual.tower.class_embedding"
    assert not host.state_dict()[token].equal(tuned.state_dict()[token])
    # The run can be taken up as a start of another one, too.
    again = build_model(host_cfg(kind, depth, path))
    load_parts(again, host_cfg(kind, depth, path), strict=False)
    trained = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert trained and all(p.equal(tuned.state_dict()[name]) for name, p in trained.items())


def test_a_public_file(tmp_path):
    prefix, task = torch.randn(3, 128), torch.randn(2, 128)
    path = tmp_path / "prompt.pth"
    names = {"prefix_prompt": prefix, "task_prompt": task, "start_signal": torch.randn(1, 128)}
    save_atomic({f"clip_adapter.prompt_learner.{name}": value for name, value in names.items()}, path)
    host = load(host_cfg("freeseg", 0, path))
    assert host.prompts.prefix_prompt.equal(prefix) and host.prompts.task_prompt.equal(task)
    with pytest.raises(ValueError, match=r"without a place in the model, found for example prompts.task_prompt"):
        load(host_cfg("zsseg", 0, path))
    with pytest.raises(ValueError, match=r"0 of 1 tensors match; 1 missing, expected for example mask_prompts.embed"):
        load(host_cfg("freeseg", 2, path))
    cfg = host_cfg("freeseg", 0, path)
    cfg.MODEL.OVSEG.PROMPTS.PREFIX = 4
    with pytest.raises(ValueError, match=r"prefix_prompt is \(3, 128\) in the file, \(4, 128\) in the model"):
        load(cfg)


def test_frozen_prompts_that_no_file_has(tmp_path):
    with pytest.raises(ValueError, match="prompts.prefix_prompt is in no file") as error:
        load(host_cfg("zsseg", 0))
    assert "MODEL.OVSEG.PROMPTS.WEIGHTS" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="mask_prompts.embeddings is in no file"):
        load(host_cfg("none", 2))
    # A checkpoint of the whole host has them.
    host = randomise(Host(host_cfg()), 1)
    save_atomic(host.state_dict(), tmp_path / "host.pth")
    cfg = host_cfg()
    cfg.MODEL.WEIGHTS = str(tmp_path / "host.pth")
    loaded = load(cfg, strict=True)
    assert all(value.equal(host.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_file_for_a_model_without_prompts():
    with pytest.raises(ValueError, match="PROMPTS.WEIGHTS is some.pth, but the Host has no learned prompts"):
        load(host_cfg("none", 0, "some.pth"))


@pytest.mark.parametrize("kind", ["zsseg", "freeseg"])
def test_a_host_classifies_with_the_texts_that_were_tuned(tmp_path, kind):
    cfg = host_cfg(kind, 2)
    tuned = build_model(cfg)
    load_parts(tuned, cfg, strict=False)
    randomise(tuned.prompts, 5), randomise(tuned.mask_prompts, 6)
    save_atomic(tuned.state_dict(), tmp_path / "model_final.pth")
    cfg.MODEL.OVSEG.PROMPTS.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.MODEL.META_ARCHITECTURE = "FrozenCLIP"
    cfg.MODEL.OVSEG.PROPOSALS.NAME, cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD = "PrecomputedProposals", "none"
    host = build_model(cfg)
    load_parts(host, cfg, strict=False)
    host.eval(), tuned.eval()
    batch = [{**x, "proposals": x["instances"].gt_masks.tensor} for x in inputs()]
    texts = tuned.task_texts(batch[0]["vocabulary"])
    for task, expected in zip(["semantic", "instance", "panoptic"], texts, strict=kind == "freeseg"):
        torch.testing.assert_close(host.region_text(batch[0]["vocabulary"], task).embeds, expected.embeds)
    with torch.no_grad():
        before = host(batch)[0]["sem_seg"]
        host.mask_prompts.embeddings.zero_()
        assert (host(batch)[0]["sem_seg"] - before).abs().max() > 1e-5
