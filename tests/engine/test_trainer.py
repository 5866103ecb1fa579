"""The training step and what surrounds it, in this process."""

import json
import logging

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from ovseg_d2.data import build_train_loader
from ovseg_d2.engine import Trainer, load_config
from ovseg_d2.engine.setup import available_device, setup
from ovseg_d2.engine.trainer import NonFiniteLossError, replace_sync_batch_norm
from tests.engine.conftest import CONFIG, EXACT, ROOT, corrupt
from tests.engine.test_load_config import arguments


@pytest.fixture
def make_cfg(world, tmp_path):
    """Configs on the world's files, which are registered as a user's own data."""

    def entry(split):
        annotations = world / "ovshapes" / "annotations"
        return {
            "kind": "panoptic",
            "name": f"trainer_tests_{split}",
            "image_root": str(world / "ovshapes" / split),
            "panoptic_json": str(annotations / f"panoptic_{split}.json"),
            "panoptic_root": str(world / "ovshapes" / f"panoptic_{split}"),
        }

    def make(**opts):
        settings = EXACT | {"OUTPUT_DIR": tmp_path, "MODEL.OVSEG.TEST.TASKS": "['semantic']"}
        settings["DATASETS.REGISTER"] = [entry("train"), entry("val")]
        settings |= {"DATASETS.TRAIN": ("trainer_tests_train",), "DATASETS.TEST": ("trainer_tests_val",)}
        settings |= {key.replace("__", "."): value for key, value in opts.items()}
        return load_config(ROOT / CONFIG, [str(word) for pair in settings.items() for word in pair])

    return make


def train(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer, trainer.train()


def test_what_a_run_leaves(make_cfg, tmp_path):
    trainer, results = train(make_cfg(TEST__EVAL_PERIOD=1))
    assert results["trainer_tests_val"]["sem_seg"]["mIoU"] >= 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["iteration"] == 2 and written["seconds"] > 0 and written["model"] == "Mask2Former"
    assert (tmp_path / "model_final.pth").exists() and list(tmp_path.glob("events.out.tfevents*"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {"total_loss", "loss_ce", "lr", "data_time", "grad_norm", "trainer_tests_val/sem_seg/mIoU"} <= names
    assert trainer.network.training

    # A finished run that is resumed is evaluated again, and its seconds are kept.
    again, _ = train(make_cfg(), resume=True)
    assert again.start_iter == 2 and again.clock.seconds > written["seconds"] * 0.5


def test_nothing_is_written_without_an_output_folder(make_cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, results = train(make_cfg(OUTPUT_DIR=""))
    assert results["trainer_tests_val"]["sem_seg"]["mIoU"] >= 0 and not list(tmp_path.iterdir())


class Interruption(HookBase):
    """Collects the losses of every iteration; stops the training after some."""

    def __init__(self, stop_after=None):
        self.losses = []
        self.stop_after = stop_after

    def after_step(self):
        names = [name for name in self.trainer.storage.histories() if "loss" in name]
        self.losses.append({name: self.trainer.storage.history(name).latest() for name in names})
        if len(self.losses) == self.stop_after:
            raise KeyboardInterrupt


def test_resumed_run_equals_an_uninterrupted_one(make_cfg, tmp_path):
    def run(folder, resume=False, stop_after=None):
        (tmp_path / folder).mkdir(exist_ok=True)
        opts = {"OUTPUT_DIR": tmp_path / folder, "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2}
        torch.manual_seed(0)
        trainer = Trainer(make_cfg(**opts, DATASETS__TEST="()"))
        trainer.register_hooks([hook := Interruption(stop_after)])
        trainer.clock.load_state_dict({"seconds": 0.0 if resume else 100.0})
        trainer.resume_or_load(resume=resume)
        if stop_after:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train()
        return trainer, hook.losses

    _, whole = run("whole")
    # The third iteration is lost, for the last checkpoint is older; it is done again.
    stopped, first = run("parts", stop_after=3)
    resumed, second = run("parts", resume=True)
    assert resumed.start_iter == 2 and len(first[:2] + second) == len(whole) == 4
    for found, expected in zip(first[:2] + second, whole, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert resumed.clock.seconds > 100 < stopped.clock.seconds


def test_bfloat16_autocast(make_cfg):
    trainer, _ = train(make_cfg(SOLVER__AMP__ENABLED=True, DATASETS__TEST="()"))
    assert trainer.autocast_dtype == torch.bfloat16
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


def test_float16_needs_cuda(make_cfg):
    with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE is float16, which needs CUDA"):
        Trainer(make_cfg(SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="float16"))


def test_a_loss_that_is_not_finite_names_itself_and_the_images(make_cfg):
    cfg = make_cfg(SOLVER__BASE_LR=1e30, SOLVER__CLIP_GRADIENTS__ENABLED=False, SOLVER__MAX_ITER=5)
    with pytest.raises(NonFiniteLossError, match=r"iteration \d: loss_\w+ is (nan|inf), .*\.jpg") as error:
        train(cfg)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_clipping_acts_on_the_gradients_of_the_step(make_cfg):
    cfg = make_cfg(SOLVER__CLIP_GRADIENTS__CLIP_VALUE=1e-3)
    logged = []
    for scale in (None, 2.0**16):
        torch.manual_seed(0)
        trainer = Trainer(cfg)
        if scale:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.batches = iter(build_train_loader(cfg))
        with EventStorage(0) as trainer.storage:
            trainer.iter = 0
            trainer.run_step()
        norm = torch.stack([p.grad.norm() for p in trainer.network.parameters() if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)
        logged.append(trainer.storage.histories()["grad_norm"].latest())
    # Without the scale of float16 training: the clip acts on the true gradients.
    assert logged[1] == pytest.approx(logged[0], rel=1e-3) and logged[0] > 1e-2


@pytest.mark.parametrize("on_corrupt", ["skip", "raise"])
def test_a_corrupt_training_image(make_cfg, world, caplog, on_corrupt):
    cfg = make_cfg(DATALOADER__ON_CORRUPT_IMAGE=on_corrupt, DATASETS__TEST="()")
    with corrupt(world) as image, caplog.at_level(logging.WARNING):
        if on_corrupt == "raise":
            with pytest.raises(ValueError, match=image.name):
                train(cfg)
        else:
            train(cfg)
            assert image.name in caplog.text and "times a training image could not be decoded" in caplog.text


def test_sync_batch_norm_becomes_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.SyncBatchNorm(4, eps=1e-3)))
    model[1][0].running_mean.fill_(3.0)
    replaced = replace_sync_batch_norm(model)[1][0]
    assert type(replaced) is nn.BatchNorm2d and replaced.eps == 1e-3 and (replaced.running_mean == 3).all()


def test_device_falls_back_with_a_line(make_cfg, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to use")
    assert available_device("cuda") == "cpu" == available_device("cuda:1")
    cfg = make_cfg()
    datasets = ("DATASETS.TRAIN", str(cfg.DATASETS.TRAIN), "DATASETS.TEST", str(cfg.DATASETS.TEST))
    cfg = setup(arguments("OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cuda", *datasets))
    assert cfg.MODEL.DEVICE == "cpu"
    assert (tmp_path / "log.txt").read_text().count("no usable GPU") == 1
