"""The worked example of CONTRIBUTING.md runs as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from ovseg_d2.engine.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def example():
    """What the two Python blocks define; the registry is as before afterwards."""
    before = dict(META_ARCH_REGISTRY._obj_map)
    names = {"__name__": "worked_example"}
    for block in blocks("python"):
        exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    yield names
    META_ARCH_REGISTRY._obj_map.clear()
    META_ARCH_REGISTRY._obj_map.update(before)


def test_the_worked_example(example, tmp_path):
    (config,) = blocks("yaml")
    folder = shutil.copytree(ROOT / "configs", tmp_path / "configs") / "ovshapes"  # where the text puts it
    (folder / "dense_adapter.yaml").write_text(config)
    cfg = load_config(folder / "dense_adapter.yaml", ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = build_model(cfg)
    assert type(model) is example["DenseAdapter"]
    example["check"](model)


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", TEXT)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_files_that_are_named_exist():
    examples = {"configs/ovshapes/dense_adapter.yaml", "ovseg_d2/modeling/meta_arch/dense_adapter.py"}
    named = set(re.findall(r"`((?:ovseg_d2|tests|configs|docs)/[\w/.]+\.\w+)`", TEXT)) - examples
    assert named and [name for name in named if not (ROOT / name).exists()] == []
