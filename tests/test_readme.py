"""What the README tells people to type works: commands parse, files exist, its Python and YAML run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from ovseg_d2.engine import default_argument_parser
from ovseg_d2.engine.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(start):
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith(start)]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.split()[1] for command in commands("make")]
    assert {"quickstart", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", commands("python train_net.py"))
def test_training_commands(command):
    args = default_argument_parser().parse_args(shlex.split(command)[2:])
    assert load_config(ROOT / args.config_file, args.opts).MODEL.META_ARCHITECTURE


@pytest.mark.parametrize("command", commands("python demo/demo.py"))
def test_demo_commands(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    import demo

    args = demo.parse_args(shlex.split(command)[2:])
    assert load_config(ROOT / args.config_file, args.opts).MODEL.META_ARCHITECTURE


def test_yaml_for_own_data(tmp_path, monkeypatch):
    (text,) = blocks("yaml")
    entries = yaml.safe_load(text)["DATASETS"]["REGISTER"]
    assert {entry["kind"] for entry in entries} == {"panoptic"}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for entry in entries:
        file = tmp_path / entry["panoptic_json"]
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup", "isthing": 1}]}')
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("configs/", f"{ROOT}/configs/"))
    assert load_config(file).DATASETS.TRAIN == ("mine_train",)


def test_python_block(tmp_path):
    """Run as it stands, in a folder where the quickstart has left its files; the weights are random here."""
    (code,) = blocks("python")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    write_world(str(tmp_path / "datasets" / "ovshapes"), WorldSettings(train=1, val=1))
    save = """
import torch
from pathlib import Path
from detectron2.modeling import build_model
from ovseg_d2.engine.load_config import load_config
import ovseg_d2.modeling
model = build_model(load_config("configs/ovshapes/fcclip.yaml", ["MODEL.DEVICE", "cpu"]))
path = Path("output/quickstart/training/model_final.pth")
path.parent.mkdir(parents=True)
torch.save({"model": model.state_dict()}, path)
"""
    check = "\nassert picture.shape == image.shape and results['sem_seg'].shape == (3, *image.shape[:2])\n"
    done = subprocess.run(
        [sys.executable, "-c", save + code + check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
