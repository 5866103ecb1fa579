"""Every model keeps to its device: on a GPU that is not there, pictures come from the CPU as the loaders give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor, nn

from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from ovseg_d2.engine import Trainer, load_config
from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows
from ovseg_d2.predictor import OpenVocabPredictor
from tests.engine.conftest import CONFIG, EXACT, ROOT
from tests.helpers import ovshapes_below, tiny_cfg
from tests.modeling.test_dense_clip import dense_cfg
from tests.modeling.test_maft_plus import plus_cfg
from tests.modeling.test_prompt_tuning import prompt_cfg
from tests.modeling.test_training_free import free_cfg
from tests.modeling.tiny_fcclip import COLOURS, fcclip_cfg
from tests.modeling.tiny_fga_seg import fga_cfg
from tests.modeling.tiny_hosts import host_cfg, host_inputs, maft_cfg
from tests.modeling.tiny_ldvc import ldvc_cfg
from tests.modeling.tiny_maskclippp import maskclippp_cfg
from tests.modeling.tiny_mta_clip import mta_cfg
from tests.modeling.tiny_sam import write_tiny_sam
from tests.pretend_gpu import GPUTensor, PretendGPU

SIZE = (41, 56)
OVSEG = "MODEL.OVSEG."
SWIN = [
    *("MODEL.BACKBONE.NAME", "SwinTransformer", "MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [2, 2, 1, 1]),
    *("MODEL.SWIN.NUM_HEADS", [1, 2, 2, 2], "MODEL.SWIN.WINDOW_SIZE", 4),
]
PROXY = [f"{OVSEG}TRAINING_FREE.PROXY.NAME", "test_vit", f"{OVSEG}TRAINING_FREE.PROXY.PRETRAINED", ""]
INSTANCES = [
    *("INPUT.TARGETS", "panoptic", f"{OVSEG}FROZEN_CLIP.TRAIN_TASKS", ["instance"]),
    *(f"{OVSEG}TEST.MERGE", "freeseg", f"{OVSEG}TEST.TASKS", ["semantic", "panoptic", "instance"]),
]
SAM = [
    *(f"{OVSEG}PROPOSALS.SAM.POINTS_PER_SIDE", 2, f"{OVSEG}PROPOSALS.SAM.PRED_IOU_THRESHOLD", -1e9),
    *(f"{OVSEG}PROPOSALS.SAM.STABILITY_THRESHOLD", 0.0, f"{OVSEG}PROPOSALS.SAM.NAME", "{folder}"),
]
MATCHED = [
    *(f"{OVSEG}PROPOSALS.NAME", "Mask2FormerProposals", f"{OVSEG}PROPOSALS.CLASS_HEAD", "linear"),
    *(f"{OVSEG}PROPOSALS.TRAINABLE", "frozen", f"{OVSEG}PROPOSALS.DATASET", "ovshapes_train"),
    *(f"{OVSEG}ENSEMBLE.NAME", "maskclippp", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 72),
]
#: Models, with options that run code which makes tensors.
MODELS: dict[str, tuple[Callable[[], CfgNode], list[Any]]] = {
    "Mask2Former": (tiny_cfg, SWIN),
    "FCCLIP": (fcclip_cfg, [f"{OVSEG}TEXT.CACHE_DIR", "{folder}"]),
    "MAFTPlus": (plus_cfg, []),
    "TrainingFree, crops": (partial(free_cfg, "OVShapes-ViT", "crops"), [f"{OVSEG}CROPS.STYLE", "crop"]),
    "TrainingFree, masks": (partial(free_cfg, "OVShapes-ViT", "masks", MASK_MODE="maft"), []),
    "TrainingFree, pooling": (partial(free_cfg, "OVShapes-RN", "masks"), []),
    "TrainingFree, pixels": (partial(free_cfg, "OVShapes-ViT", "dense", LAST_BLOCK="proxy"), PROXY),
    "FrozenCLIP, MaskFormer": (host_cfg, [f"{OVSEG}CROPS.STYLE", "cropmask"]),
    "FrozenCLIP, FreeSeg": (partial(host_cfg, "FreeSegProposals"), INSTANCES),
    "FrozenCLIP, FC-CLIP": (partial(host_cfg, "FCCLIPProposals"), []),
    "MAFT": (maft_cfg, []),
    "MAFT, SAM": (partial(maft_cfg, "SAMProposals", "OVShapes-RN"), SAM),
    "MaskCLIPpp": (maskclippp_cfg, []),
    "MaskCLIPpp, matched": (partial(maskclippp_cfg, "OVShapes-RN", SIMILARITY="pseudo_text", PRIOR="matched"), MATCHED),
    "PromptTuning": (partial(prompt_cfg, "zsseg", 2), []),
    "MTACLIP": (partial(mta_cfg, SEPARATE_ATTENTION=True), []),
    "DenseCLIP": (dense_cfg, [f"{OVSEG}TEST.SLIDING.SIZE", 32, f"{OVSEG}TEST.SLIDING.STRIDE", 24]),
    "DenseCLIP, ViT": (partial(dense_cfg, "OVShapes-ViT"), []),
    "CATSeg": (partial(fga_cfg, "CATSeg"), []),
    "FGASeg": (partial(fga_cfg, MAX_CLASSES=3, ALIGN_LOSS="mse"), []),
    "FGASeg, fast": (partial(fga_cfg, FAST=True, FUSION="add", TOP_K=2), []),
    "LDVC": (partial(ldvc_cfg, AUX_WEIGHT=0.5, FORM="gather"), []),
    "ZegCLIP": (partial(ldvc_cfg, "ZegCLIP", SETTING="transductive"), ["MODEL.WEIGHTS", "inductive.pth"]),
}


@pytest.fixture
def gpu() -> Iterator[PretendGPU]:
    with PretendGPU() as gpu:
        yield gpu


def tensors(results: Any) -> list[Tensor]:
    """All tensors in a model's results."""
    if isinstance(results, Tensor):
        return [results]
    if hasattr(results, "get_fields"):
        results = results.get_fields()
    if hasattr(results, "tensor"):
        return [results.tensor]
    parts = results.values() if isinstance(results, dict) else results if isinstance(results, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_every_model_is_here():
    ours = {name for name, kind in META_ARCH_REGISTRY if kind.__module__.startswith("ovseg_d2.")}
    assert {name.partition(",")[0] for name in MODELS} == ours


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_then_training(name, gpu, tmp_path):
    torch.manual_seed(0)
    make, options = MODELS[name]
    cfg = make()
    if "SAM" in name:
        write_tiny_sam(tmp_path)
    cfg.merge_from_list(["MODEL.DEVICE", "cuda", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", len(COLOURS)])
    cfg.merge_from_list([str(tmp_path) if option == "{folder}" else option for option in options])
    model = build_model(cfg)
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    vocabulary = replace(COLOURS, is_seen=(True, True, False, True)) if name == "ZegCLIP" else COLOURS
    batch = host_inputs(SIZE, vocabulary=vocabulary)
    if name != "PromptTuning":
        with torch.inference_mode():
            results = model.eval()(batch)
        assert tensors(results) and all(tensor.is_cuda for tensor in tensors(results))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    # What evaluation has kept must do for training.
    with torch.autocast("cuda", torch.bfloat16):
        losses = model.train()(batch)
    assert all(loss.is_cuda and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in trained if p.grad is not None]
    assert gradients and all(gradient.is_cuda for gradient in gradients)


def test_a_run_and_a_picture(gpu, tmp_path):
    """The loop, its checkpoint, all evaluators; and what is made of results."""
    write_world(str(tmp_path / "ovshapes"), WorldSettings(train=2, val=1, min_size=64, max_size=64))
    settings = EXACT | {"MODEL.DEVICE": "cuda", "SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 1}
    settings |= {"OUTPUT_DIR": tmp_path / "run", "SOLVER.AMP.ENABLED": True}
    settings |= {"MODEL.OVSEG.TEST.TASKS": "['semantic', 'panoptic', 'instance']", "MODEL.OVSEG.TEST.ORACLE": "iou"}
    (tmp_path / "run").mkdir()
    with ovshapes_below(tmp_path):
        cfg = load_config(ROOT / CONFIG, [str(word) for pair in settings.items() for word in pair])
        trainer = Trainer(cfg)
        (scores,) = trainer.train().values()
        assert trainer.network.pixel_mean.is_cuda
        assert {"sem_seg", "sem_seg_oracle", "panoptic_seg", "segm"} <= set(scores)
        assert (tmp_path / "run" / "model_final.pth").exists()

        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        torch.save({name: tensor.cpu() for name, tensor in trainer.network.state_dict().items()}, cfg.MODEL.WEIGHTS)
        predictor = OpenVocabPredictor(cfg, score_threshold=0.0)
    image = np.zeros((*SIZE, 3), np.uint8)
    results = predictor(image)
    for task in ("semantic", "panoptic", "instance"):
        assert predictor.to_json(results, task)[0]["task"] == task
        assert predictor.draw(image, results, task).shape == image.shape


class Stray(nn.Module):
    """Adds a tensor that it makes on the CPU."""

    def __init__(self, stray: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.stray = stray

    def forward(self, x: Tensor) -> Tensor:
        return self.stray(self.scale * x)


@pytest.mark.parametrize(
    "stray",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.zeros(3)[x.detach().long()],
        lambda x: torch.stack([x[0], torch.tensor(1.0)]),
        lambda x: torch.zeros(3).add_(x),
        lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
        lambda x: torch.zeros_like(x).uniform_(generator=torch.Generator()),
        lambda x: torch.from_numpy(x.detach().numpy()),
        lambda x: torch.as_tensor(np.asarray(x.detach())),
    ],
)
def test_what_cuda_refuses(stray, gpu):
    model = Stray(stray)
    model(torch.zeros(3))
    model.to("cuda")
    with pytest.raises((RuntimeError, TypeError), match="device|cuda"):
        model(torch.zeros(3, device="cuda"))


def test_what_cuda_allows(gpu):
    model = Stray(lambda x: x[torch.tensor([2, 0])] * torch.tensor(2.0) + x.new_tensor([1.0, 2.0]))
    before = model.scale
    model.cuda()
    assert model.scale is before and before.is_cuda
    x = torch.arange(3.0, requires_grad=True)
    y = model(x.to(model.scale.device))
    assert isinstance(y, GPUTensor) and y.device == torch.device("cuda:0")
    y[:1].mul_(3.0)
    y.sum().to("cpu").backward()
    assert type(x.grad) is Tensor and x.grad.tolist() == [2.0, 0.0, 6.0]
    assert model.scale.grad.is_cuda and model.scale.grad.tolist() == [0.0, 0.0, 12.0]
    assert torch.equal(y.cpu(), torch.tensor([15.0, 2.0]))
    generator = torch.Generator("cuda").manual_seed(1)
    assert torch.rand(2, generator=generator, device="cuda").is_cuda


def test_autocast(gpu):
    x = torch.ones(2, 2, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16 and (x @ x).softmax(-1).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert (x @ x).dtype == torch.bfloat16
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32


def test_where_the_host_waits(gpu):
    rows = ClassRows.of_mask(torch.tensor([[True, False], [True, True]], device="cuda"))
    (wait,) = gpu.waits
    assert wait.startswith("nonzero at modeling/pixel_classification/class_rows.py:") and gpu.waits[wait] == 1
    counts = rows.counts()
    assert len(gpu.waits) == 1
    assert counts.tolist() == [1, 2]


def test_nothing_stays_changed():
    with PretendGPU():
        assert torch.zeros(1, device="cuda").is_cuda
    assert torch.zeros is torch._C._VariableFunctions.zeros and torch.Tensor.to is torch._C.TensorBase.to
