"""Every key is read by somebody, every YAML file makes a model, the public configurations have the public numbers."""

import ast
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import ovseg_d2.data  # registers the datasets
import ovseg_d2.modeling  # noqa: F401  registers the models
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.vocabulary import training_vocabulary
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.modeling.clip import build

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ovseg_d2"
CONFIGS = ROOT / "configs"
YAML_FILES = [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.yaml"))]
MODEL_FILES = [name for name in YAML_FILES if not Path(name).name.startswith("Base-")]


def leaves(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def added_keys() -> list[str]:
    cfg = get_cfg()
    before = set(leaves(cfg))
    add_ovseg_config(cfg)
    return [key for key in leaves(cfg) if key not in before]


def keys_read(source: str) -> set[str]:
    """Dotted paths of the upper-case attributes that functions read: ``loss = cfg.MODEL.LOSS; loss.MASK`` gives
    ``MODEL.LOSS.MASK``; what a function gets as an argument has no path before it."""
    found = set()
    for scope in ast.walk(ast.parse(source)):
        if not isinstance(scope, ast.FunctionDef):
            continue
        aliases: dict[str, set[str]] = {}
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign):
                targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets[:1]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                for target, value in zip(targets, values, strict=False):
                    if isinstance(target, ast.Name):
                        aliases[target.id] = key_paths(value, aliases)
        found = found.union(*(key_paths(node, aliases) for node in ast.walk(scope) if isinstance(node, ast.Attribute)))
    return found


def key_paths(node: ast.AST, aliases: dict[str, set[str]]) -> set[str]:
    """What an expression can be as a path of upper-case attributes; "" for anything else."""
    if isinstance(node, ast.Attribute) and node.attr.isupper():
        return {f"{path}.{node.attr}".lstrip(".") for path in key_paths(node.value, aliases)}
    if isinstance(node, ast.IfExp):
        return key_paths(node.body, aliases) | key_paths(node.orelse, aliases)
    return aliases.get(node.id, {""}) if isinstance(node, ast.Name) else {""}


def unread(keys: list[str], sources: list[str]) -> list[str]:
    """The keys that no source reads by a path that fits no other key."""
    read = set().union(*map(keys_read, sources))
    suffixes = {key: [key.split(".", i)[-1] for i in range(key.count(".") + 1)] for key in keys}
    shared = [suffix for key in keys for suffix in suffixes[key]]
    return [key for key in keys if not any(s in read and shared.count(s) == 1 for s in suffixes[key])]


def test_every_key_is_read():
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "config"]
    assert unread(added_keys(), sources) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(cfg):\n    return cfg.MODEL.A.NAME", ["MODEL.B.NAME", "MODEL.SIZE"]),
        ("def f(cfg):\n    a, b = cfg.MODEL.A, cfg.MODEL.B\n    return a.NAME, b.NAME, cfg.MODEL.SIZE", []),
        ("def f(model):\n    return model.B.NAME, model.SIZE", ["MODEL.A.NAME"]),
        ("def f(cfg, b):\n    return (cfg.MODEL.B if b else cfg.MODEL.A).NAME, cfg.MODEL.SIZE", []),
        ("def f(cfg):\n    a = cfg.MODEL.A\n\ndef g(a):\n    return a.NAME, a.SIZE", ["MODEL.A.NAME", "MODEL.B.NAME"]),
        ("def f(node):\n    return node.NAME, node.SIZE", ["MODEL.A.NAME", "MODEL.B.NAME"]),
    ],
)
def test_an_unread_key_is_found(source, expected):
    assert unread(["MODEL.A.NAME", "MODEL.B.NAME", "MODEL.SIZE"], [source]) == expected


@cache
def loaded(name: str) -> CfgNode:
    """The configuration of a file, for reading."""
    cfg = load_config(CONFIGS / name, ["MODEL.DEVICE", "meta"])
    cfg.freeze()
    return cfg


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_merges_and_is_consistent(name):
    cfg = loaded(name)
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and name in MODEL_FILES:
        assert all(0 < step < solver.MAX_ITER for step in solver.STEPS)
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert dataset in DatasetCatalog.list()


# Millions of parameters that the public Mask2Former models are listed with, by the end of the file's name.
PUBLIC_SIZES = {"R50": 44, "R101": 63, "SwinT": 47, "SwinS": 69, "SwinB": 107, "SwinB_IN21k": 107, "SwinL_IN21k": 216}


# Keys of the model that its building does not depend on, or only in the rows of a table.
NOT_BUILT = {
    *("WEIGHTS", "PRETRAINED", "CLIP_PRETRAINED", "TEMPLATES", "TEST", "LAMBDA", "LAMBDA_OF", "ALPHA", "BETA"),
    *("IGNORE_VALUE", "NUM_CLASSES", "NUM_QUERIES"),
}


def model_signature(cfg: CfgNode) -> str:
    """What of a configuration makes its model."""

    def kept(node: CfgNode) -> dict:
        return {
            key: kept(value) if isinstance(value, CfgNode) else value
            for key, value in node.items()
            if key not in NOT_BUILT
        }

    # MaskCLIP++ compares its generator's classes with those of the dataset; others take the classes as they are.
    data = (cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    return f"{kept(cfg.MODEL)} {cfg.INPUT.TARGETS} {data if cfg.MODEL.META_ARCHITECTURE == 'MaskCLIPpp' else ''}"


@pytest.fixture(scope="module")
def built() -> dict[str, float]:
    """Millions of parameters of the models that were built, by their signatures."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def nothing_twice():
    """Tokenizers and CLIPs are made once for all models, and YAML is read in C: it saves two thirds of the time."""
    clips = cache(build._open_clip_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        patch.setattr(open_clip, "get_tokenizer", cache(open_clip.get_tokenizer))
        patch.setattr(build, "_open_clip_model", lambda name: deepcopy(clips(name)))
        yield


@pytest.fixture
def no_initial_values(monkeypatch):
    """Without storage there is nothing to fill, and pretending to takes half of the time."""
    for name in ("normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_yaml_builds_on_the_meta_device(name, built, no_initial_values):
    cfg = loaded(name)
    vocabulary = training_vocabulary(cfg.DATASETS.TRAIN)
    assert vocabulary is None or len(vocabulary) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    signature = model_signature(cfg)
    if signature not in built:  # else it is another file's model with other weights, texts, classes or thresholds
        with torch.device("meta"):
            model = build_model(cfg)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model.vocabulary == vocabulary
        built[signature] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if name.startswith("mask2former/"):
        assert built[signature] == pytest.approx(PUBLIC_SIZES[Path(name).stem.split("_", 2)[2]], abs=0.6)


# file, classes, iterations, train sizes (first, last, crop), test size, tasks
PUBLIC = [
    ("coco_panoptic_R50", 133, 368750, None, (800, 1333), {"semantic", "instance", "panoptic"}),
    ("coco_instance_R50", 80, 368750, None, (800, 1333), {"instance"}),
    ("ade20k_semantic_R50", 150, 160000, (256, 1024, [512, 512]), (512, 2048), {"semantic"}),
    ("ade20k_panoptic_R50", 150, 160000, (320, 1280, [640, 640]), (640, 2560), {"semantic", "instance", "panoptic"}),
    ("ade20k_instance_R50", 100, 160000, (320, 1280, [640, 640]), (640, 2560), {"instance"}),
    ("cityscapes_semantic_R50", 19, 90000, (512, 2048, [512, 1024]), (1024, 2048), {"semantic"}),
    (
        "cityscapes_panoptic_R50",
        19,
        90000,
        (512, 2048, [512, 1024]),
        (1024, 2048),
        {"semantic", "instance", "panoptic"},
    ),
    ("cityscapes_instance_R50", 8, 90000, (512, 2048, [512, 1024]), (1024, 2048), {"instance"}),
]


@pytest.mark.parametrize("dataset", ["coco_panoptic", "ade20k_semantic", "cityscapes_semantic"])
def test_the_largest_models_have_more_queries_for_segments(dataset):
    cfg = loaded(f"mask2former/{dataset}_SwinL_IN21k.yaml")
    assert cfg.MODEL.OVSEG.PROPOSALS.NUM_QUERIES == (100 if "semantic" in dataset else 200)
    assert cfg.SOLVER.MAX_ITER == {"coco": 737500, "ade20k": 160000, "cityscapes": 90000}[dataset.split("_")[0]]


@pytest.mark.parametrize("name", [n for n in MODEL_FILES if n.startswith("mask2former/") and "_semantic_" in n])
def test_several_scales_are_multiples_of_the_test_size(name):
    """What the public multi-scale numbers are made with: 0.5 to 1.75 times the size of one scale, and mirrored."""
    cfg = loaded(name)
    aug, size = cfg.TEST.AUG, cfg.INPUT.MIN_SIZE_TEST
    assert list(aug.MIN_SIZES) == [size * quarters // 4 for quarters in range(2, 8)]
    assert aug.FLIP and not aug.ENABLED and aug.MAX_SIZE == (4096 if "cityscapes" in name else 7 * size)


@pytest.mark.parametrize(("name", "classes", "iterations", "train", "test", "tasks"), PUBLIC)
def test_public_schedules(name, classes, iterations, train, test, tasks):
    cfg = loaded(f"mask2former/{name}.yaml")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == classes
    assert cfg.MODEL.OVSEG.PROPOSALS.NUM_QUERIES == 100
    assert set(cfg.MODEL.OVSEG.TEST.TASKS) == tasks
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (iterations, 16, 1e-4)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == test
    if train is None:
        assert (cfg.INPUT.PIPELINE, cfg.INPUT.IMAGE_SIZE, cfg.INPUT.COLOR_AUG_SSD) == ("lsj", 1024, False)
        assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((327778, 355092), 10)
    else:
        sizes = cfg.INPUT.MIN_SIZE_TRAIN
        assert cfg.INPUT.PIPELINE == "crop" and cfg.INPUT.CROP.ENABLED and cfg.INPUT.COLOR_AUG_SSD
        assert (sizes[0], sizes[-1], len(sizes), list(cfg.INPUT.CROP.SIZE)) == (train[0], train[1], 16, train[2])
        assert cfg.INPUT.MAX_SIZE_TRAIN == 2 * sizes[-1]
        assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.WARMUP_ITERS) == ("WarmupPolyLR", 0)
