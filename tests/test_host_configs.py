"""The files of MAFT's tables: every row has one, docs/maft.md names them, and the second stage changes nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

import ovseg_d2.data  # registers the datasets
import ovseg_d2.modeling  # noqa: F401  registers the models
from ovseg_d2.engine.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
FOLDERS = ("frozen_clip", "zegformer", "zsseg", "freeseg", "ovseg", "maft")
FILES = [
    str(path.relative_to(CONFIGS))
    for folder in FOLDERS
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
    if not path.name.startswith("Base-")
]
MAFT_FILES = [name for name in FILES if name.startswith("maft/")]
#: Training classes and iterations of the second stage (section 5.1), by the start of a file's name.
SETTINGS = {"coco_156": (156, 1000), "coco_171": (171, 1000), "voc_15": (15, 100), "ade20k_572": (572, 5000)}
#: What the second stage may set otherwise than the host.
SECOND_STAGE = re.compile(
    r"MODEL\.(META_ARCHITECTURE|WEIGHTS|OVSEG\.(CLIP\.(RESIZE|INPUT_SIZE|TRAINABLE)|MAFT\.\w+))|CHECKPOINT\.ALLOW_PICKLE"
    r"|SOLVER\.(IMS_PER_BATCH|BASE_LR|WEIGHT_DECAY|WARMUP_\w+|MAX_ITER)"
)


def setting_of(name: str) -> tuple[int, int] | None:
    return next((values for key, values in SETTINGS.items() if key in name), None)


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def host_of(name: str) -> str:
    """``maft/freeseg_coco_156_R101.yaml`` -> ``freeseg/coco_156_R101.yaml``."""
    folder, rest = Path(name).name.split("_", 1)
    return f"frozen_clip/sam_{rest}" if folder == "sam" else f"{folder}/{rest}"


def build(name: str) -> torch.nn.Module:
    cfg = load_config(CONFIGS / name, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return build_model(cfg)


def num_trainable(module: torch.nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in module.parameters())


def test_every_row_of_the_tables_has_a_file():
    zero_shot = [f"{d}_R101" for d in ("coco_156", "voc_15", "ade20k_572")]
    open_vocabulary = [f"coco_171_R101_{clip}" for clip in ("ViTB16", "ViTL14", "RN50")]
    sam = ["voc_15", "coco_156", "coco_171"]
    hosts = [f"{host}/{name}" for host in ("zegformer", "zsseg", "freeseg") for name in zero_shot]
    hosts += [f"freeseg/{name}" for name in open_vocabulary] + [f"frozen_clip/sam_{name}" for name in sam]
    tuned = [f"maft/{host.replace('/', '_').removeprefix('frozen_clip_')}" for host in hosts]
    rows = {*hosts, *tuned, "ovseg/coco_171_R101_ViTB16", "ovseg/coco_171_SwinB_ViTL14"}
    assert rows <= {name.removesuffix(".yaml") for name in FILES}
    assert {host_of(name) for name in MAFT_FILES} == {f"{host}.yaml" for host in hosts}


def test_the_page_names_every_file_and_no_other():
    text = (ROOT / "docs" / "maft.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:configs/)?((?:{'|'.join(FOLDERS)})/[\w-]+\.yaml)", text))
    assert named <= set(FILES)
    prompts = {name for name in FILES if name.endswith("_prompts.yaml")}
    assert set(FILES) - prompts <= named


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len((CONFIGS / name).read_text(encoding="utf-8").splitlines()) < 15


@pytest.mark.parametrize("name", FILES)
def test_numbers_of_classes_and_lambdas(name):
    cfg = load_config(CONFIGS / name)
    setting = setting_of(name)
    assert setting is None or cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == setting[0]
    for dataset, weight in cfg.MODEL.OVSEG.ENSEMBLE.LAMBDA_OF:
        assert dataset in DatasetCatalog.list() and dataset in cfg.DATASETS.TEST
        assert 0 < weight < 1


@pytest.mark.parametrize("name", MAFT_FILES)
def test_the_second_stage_alone_differs_from_the_host(name):
    cfg, host = (dict(leaves(load_config(CONFIGS / file))) for file in (name, host_of(name)))
    differing = {key for key in cfg if cfg[key] != host[key]}
    assert not [key for key in differing if not SECOND_STAGE.fullmatch(key)]
    assert (cfg["MODEL.META_ARCHITECTURE"], host["MODEL.META_ARCHITECTURE"]) == ("MAFT", "FrozenCLIP")
    assert (cfg["MODEL.OVSEG.CLIP.RESIZE"], cfg["MODEL.OVSEG.CLIP.INPUT_SIZE"]) == ("padded_square", 480)
    assert (cfg["SOLVER.IMS_PER_BATCH"], cfg["SOLVER.BASE_LR"]) == (16, 1e-5)
    assert cfg["SOLVER.MAX_ITER"] == setting_of(name)[1]
    assert (cfg["SOLVER.WARMUP_ITERS"], cfg["SOLVER.CLIP_GRADIENTS.CLIP_VALUE"]) == (0, 0.01)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("_prompts.yaml")])
def test_prompts_are_those_of_their_host(name):
    cfg, host = (load_config(CONFIGS / file) for file in (name, name.replace("prompts", "R101")))
    assert cfg.MODEL.META_ARCHITECTURE == "PromptTuning" and host.MODEL.META_ARCHITECTURE == "FrozenCLIP"
    for block in ("PROMPTS", "TEXT", "CLIP"):
        same = [dict(leaves(c.MODEL.OVSEG[block])) for c in (cfg, host)]
        for values in same:
            values.pop("MASKS_PER_IMAGE", None)
        assert same[0] == same[1]
    assert cfg.DATASETS.TRAIN == host.DATASETS.TRAIN and not cfg.DATASETS.TEST


@pytest.mark.parametrize(
    ("name", "generator", "ensemble", "style"),
    [
        ("zegformer/voc_15_R101.yaml", "MaskFormerProposals", "zegformer", "cropmask"),
        ("zsseg/voc_15_R101.yaml", "MaskFormerProposals", "zsseg", "mask_crop"),
        ("freeseg/voc_15_R101.yaml", "FreeSegProposals", "zsseg", "mask_crop"),
        ("freeseg/coco_fusion_R101.yaml", "FreeSegProposals", "zsseg", "mask_crop"),
        ("ovseg/coco_171_SwinB_ViTL14.yaml", "MaskFormerProposals", "ovseg", "mask_crop"),
        ("frozen_clip/sam_voc_15.yaml", "SAMProposals", "none", "mask_crop"),
    ],
)
def test_hosts(name, generator, ensemble, style):
    model = build(name)
    assert type(model).__name__ == "FrozenCLIP" and type(model.proposals).__name__ == generator
    assert (model.ensemble.name, model.mask_encoder.crops.style) == (ensemble, style)
    assert (model.prompts is not None) == (name.startswith("zsseg") or "fusion" in name)
    assert (model.mask_prompts is not None) == name.startswith("ovseg")
    # Nothing but the generator trains; SAM does not.
    assert num_trainable(model) == num_trainable(model.proposals)
    assert (num_trainable(model) > 0) == (generator != "SAMProposals")


@pytest.mark.parametrize(
    ("name", "generator", "trainable"),
    [
        # A block's attention and two norms have 8 tensors, the last norm 2; an attention pool has 8.
        ("maft/zegformer_coco_156_R101.yaml", "MaskFormerProposals", 12 * 8 + 2),
        ("maft/freeseg_coco_171_R101_ViTL14.yaml", "FreeSegProposals", 24 * 8 + 2),
        ("maft/freeseg_coco_171_R101_RN50.yaml", "FreeSegProposals", 8),
        ("maft/sam_coco_171.yaml", "SAMProposals", 12 * 8 + 2),
    ],
)
def test_maft_trains_the_attention_of_ip_clip_alone(name, generator, trainable):
    model = build(name)
    assert type(model).__name__ == "MAFT" and type(model.proposals).__name__ == generator
    assert num_trainable(model) == num_trainable(model.ip_clip) == trainable
