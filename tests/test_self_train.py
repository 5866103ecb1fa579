"""tools/self_train.py: what gets a label, an interruption, and a training step on the labels."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from ovseg_d2.data import build_train_loader
from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES, SEEN_CLASS_IDS, UNSEEN_CLASS_IDS, is_seen
from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES = 5


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("self_train", ROOT / "tools" / "self_train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["self_train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An OVShapes of five pictures, its datasets under names of this file's own, and a config of each model."""
    folder = tmp_path_factory.mktemp("world")
    write_world(str(folder / "ovshapes"), WorldSettings(train=NUM_IMAGES, val=1, min_size=64, max_size=80))
    root = folder / "ovshapes"
    before = set(DatasetCatalog.list())

    def entry(name, labels, classes, seen=None):
        names = [*CLASS_NAMES, *(f"filler {i}" for i in range(240))]
        extra = {} if seen is None else {"class_is_seen": seen}
        images = {"image_root": str(root / "train"), "semantic_root": str(root / labels)}
        return {"kind": "semantic", "name": name, "classes": [names[i] for i in classes], **images, **extra}

    every = range(len(CLASS_NAMES))
    flags = [is_seen(i) for i in every]
    entries = [
        entry("st_seen", "semantic_train_seen", SEEN_CLASS_IDS),
        entry("st_full", "semantic_train", every),
        entry("st_all", "semantic_train", every, flags),
        entry("st_nothing_unseen", "semantic_train", every, [True] * len(every)),
        entry("st_few", "semantic_train", every[:9], flags[:9]),
        entry("st_300", "semantic_train", range(300), [*flags, *[True] * 228]),
    ]
    datasets = {"REGISTER": entries, "TRAIN": ["st_seen"], "TEST": ["st_all"]}
    for model in ("training_free_dense", "host"):
        content = {"_BASE_": str(ROOT / "configs" / "ovshapes" / f"{model}.yaml"), "DATASETS": datasets}
        content["MODEL"] = {"DEVICE": "cpu"}
        (folder / f"{model}.yaml").write_text(yaml.safe_dump(content))
    yield folder
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Oracle(torch.nn.Module):
    """Knows the labels of all classes; is half sure of the right half of each picture, and fails after some images."""

    def __init__(self, world, images=NUM_IMAGES):
        super().__init__()
        self.root, self.images = world / "ovshapes" / "semantic_train", images
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        self.images -= 1
        if self.images < 0:
            raise ValueError("interrupted")
        (x,) = inputs
        truth = torch.from_numpy(np.array(Image.open(self.root / f"{Path(x['file_name']).stem}.png"))).long()
        num_classes = len(x["vocabulary"])
        scores = torch.nn.functional.one_hot(truth.clamp(max=num_classes - 1), num_classes).permute(2, 0, 1).float()
        right = slice(truth.shape[1] // 2, None)
        scores[:, :, right] += 1 / num_classes  # the share of the class is a half
        return [{"sem_seg": self.scale * scores}]


@pytest.fixture
def run(tool, world, monkeypatch, tmp_path, capsys):
    """Label with a model (an oracle by default); returns the exit code, what was printed, and the folder."""

    def run(*flags, model=None, folder=tmp_path / "pseudo", config="training_free_dense"):
        model = Oracle(world) if model is None else model
        monkeypatch.setattr(tool, "load_model", lambda cfg: model)
        command = ["--config-file", str(world / f"{config}.yaml"), "--output", str(folder), *map(str, flags)]
        code = tool.main(command)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out + err, folder

    return run


def label_files(folder):
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def expected_labels(world, threshold=0.0):
    """The true labels: of the seen classes where the seen-only files have one, of unseen ones elsewhere."""
    seen_only = label_files(world / "ovshapes" / "semantic_train_seen")
    for name, truth in label_files(world / "ovshapes" / "semantic_train").items():
        table = np.append(SEEN_CLASS_IDS, np.full(256 - len(SEEN_CLASS_IDS), 255))
        labels = table[seen_only[name]]
        fill = np.isin(truth, UNSEEN_CLASS_IDS) & (labels == 255)
        if threshold > 0.5:
            fill[:, truth.shape[1] // 2 :] = False
        yield name, np.where(fill, truth, labels)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6])
def test_labels(run, world, threshold):
    code, output, folder = run("--threshold", threshold)
    assert code == 0, output
    found, num_pseudo = label_files(folder / "labels"), 0
    for name, labels in expected_labels(world, threshold):
        assert found[name].dtype == np.uint8 and np.array_equal(found[name], labels), name
        num_pseudo += int(np.isin(labels, UNSEEN_CLASS_IDS).sum())
    assert num_pseudo > 0 and len(found) == NUM_IMAGES
    assert f"{num_pseudo} pixels of 18 unseen classes" in output
    lines = [line for line in output.splitlines() if line.startswith("stone ")]
    stone = [(labels == CLASS_NAMES.index("stone")).sum() for labels in found.values()]
    assert lines[0].split() == ["stone", str(sum(stone)), str(sum(n > 0 for n in stone))]
    assert f"python train_net.py --config-file {folder / 'pseudo.yaml'}" in output


def test_labels_of_unseen_classes_are_not_looked_at(run, world, tmp_path):
    """A dataset with all labels gives what the one without the unseen ones gives."""

    class Blind(Oracle):
        def forward(self, inputs):
            return [{"sem_seg": 0 * super().forward(inputs)[0]["sem_seg"]}]

    code, output, folder = run("--dataset", "st_full", "--name", "st_a_pseudo", model=Blind(world))
    assert code == 0, output
    for labels in label_files(folder / "labels").values():
        assert not np.isin(labels, UNSEEN_CLASS_IDS).any() and np.isin(labels, SEEN_CLASS_IDS).any()
    assert "0 pixels of 18 unseen classes" in output
    code, output, folder = run("--dataset", "st_full", folder=tmp_path / "other")
    assert code == 0, output
    for name, labels in expected_labels(world):
        assert np.array_equal(label_files(folder / "labels")[name], labels)


def summary(output):
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("unseen class"))
    return lines[start : start + 20]


def test_an_interrupted_run_goes_on(run, world):
    code, output, folder = run(model=Oracle(world, images=2))
    assert code == 2 and "error: interrupted" in output
    first = label_files(folder / "labels")
    assert len(first) == 2 and not (folder / "pseudo.yaml").exists()
    times = {path: path.stat().st_mtime_ns for path in (folder / "labels").iterdir()}
    code, output, _ = run(model=Oracle(world, images=NUM_IMAGES - 2))
    assert code == 0, output
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    found = label_files(folder / "labels")
    for name, labels in expected_labels(world):
        assert np.array_equal(found[name], labels)
    # What is there already counts, too, and nothing is made twice.
    code, again, _ = run(model=Oracle(world, images=0))
    assert code == 0 and summary(again) == summary(output) and len(summary(output)) == 20


def test_another_model_gets_another_folder(run, world, tmp_path):
    code, _, folder = run()
    assert code == 0
    other = Oracle(world)
    torch.nn.init.constant_(other.scale, 2.0)
    for flags, model in (((), other), (("--threshold", 0.5), None), (("--dataset", "st_full"), None)):
        code, output, _ = run(*flags, model=model)
        assert code == 2 and "holds labels of" in output and "give another folder, or delete it" in output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    code, output, _ = run(folder=tmp_path / "full")
    assert code == 2 and "holds other files; give another folder" in output


def test_more_classes_than_fit_in_a_byte(run, world):
    code, output, folder = run("--classes", "st_300", "--name", "st_300_pseudo")
    assert code == 0, output
    found = label_files(folder / "labels")
    for name, labels in expected_labels(world):
        assert found[name].dtype == np.uint16
        assert np.array_equal(found[name], np.where(labels == 255, 65535, labels))
    cfg = load_config(folder / "pseudo.yaml")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 300 and cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE == 65535
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2])
    batch = next(iter(build_train_loader(cfg)))
    ids = {i for x in batch for i in x["instances"].gt_classes.tolist()}
    assert ids and max(ids) < 72


def test_a_training_step_on_the_labels(run, world):
    """The host that the labels are for, from the config that was written."""
    code, output, folder = run("--retrain-config", world / "host.yaml")
    assert code == 0, output
    cfg = load_config(folder / "pseudo.yaml", ["SOLVER.IMS_PER_BATCH", "2"])
    assert list(cfg.DATASETS.TRAIN) == ["st_seen_pseudo"] and list(cfg.DATASETS.TEST) == ["st_all"]
    assert cfg.INPUT.TARGETS == "semantic" and cfg.MODEL.META_ARCHITECTURE == "FrozenCLIP"
    assert len(cfg.DATASETS.REGISTER) == 7
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get("st_seen_pseudo"))
    assert vocabulary.names == CLASS_NAMES and vocabulary.is_seen == tuple(map(is_seen, range(72)))
    assert len(DatasetCatalog.get("st_seen_pseudo")) == NUM_IMAGES
    labels = [x["sem_seg_file_name"] for x in DatasetCatalog.get("st_seen_pseudo")]
    assert all(Path(path).parent == folder / "labels" for path in labels)

    torch.manual_seed(0)
    model = build_model(cfg).train()
    assert model.vocabulary == vocabulary
    unseen = 0
    for _, batch in zip(range(4), build_train_loader(cfg), strict=False):
        unseen += sum(bool(set(x["instances"].gt_classes.tolist()) & set(UNSEEN_CLASS_IDS)) for x in batch)
    loss = sum(model(batch).values())
    loss.backward()
    assert loss.isfinite() and unseen > 0
    # A second round, for the same name, does not register it twice; a file cannot be based on itself.
    code, output, _ = run("--retrain-config", folder / "pseudo.yaml")
    assert code == 2 and "pseudo.yaml is the file that this run writes; expected another" in output
    code, output, second = run("--retrain-config", folder / "pseudo.yaml", folder=folder.parent / "second")
    assert code == 0 and len(load_config(second / "pseudo.yaml").DATASETS.REGISTER) == 7


def test_a_real_model(tool, world, tmp_path, capsys):
    """The frozen tiny CLIP of the package, pixel by pixel."""
    command = ["--config-file", str(world / "training_free_dense.yaml"), "--output", str(tmp_path / "out")]
    assert tool.main([*command, "INPUT.MIN_SIZE_TEST", "64"]) == 0
    assert "unseen class" in capsys.readouterr().out
    seen_only = label_files(world / "ovshapes" / "semantic_train_seen")
    for name, labels in label_files(tmp_path / "out" / "labels").items():
        given = seen_only[name] != 255
        assert np.array_equal(labels[given], np.array(SEEN_CLASS_IDS)[seen_only[name][given]])
        assert np.isin(labels[~given], [*UNSEEN_CLASS_IDS, 255]).all()


class Closed(torch.nn.Module):
    def forward(self, inputs):
        return [{"sem_seg": torch.zeros(54, inputs[0]["height"], inputs[0]["width"])}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "st_seen"], "dataset 'st_seen' has no class_is_seen"),
        (["--classes", "st_nothing_unseen"], "dataset 'st_nothing_unseen' has no unseen class"),
        (["--classes", "st_few"], "'st_seen' has 47 classes that are not among those of --classes"),
        (["--dataset", "st_sean"], "dataset 'st_sean' is not registered; did you mean st_seen"),
        (["--classes", "st_al"], "dataset 'st_al' is not registered"),
        (["--threshold", "1.5"], "--threshold is 1.5; expected a share from 0 to 1"),
        (["--retrain-config", "absent.yaml"], "config file absent.yaml does not exist"),
        (["DATASETS.TRAIN", "[]"], "--dataset is not given and DATASETS.TRAIN is empty"),
    ],
)
def test_bad_arguments(run, flags, message):
    code, output, folder = run(*flags)
    assert code == 2 and message in output and not folder.exists()
    assert len([line for line in output.splitlines() if line.startswith("error: ")]) == 1


def test_a_model_of_a_closed_vocabulary(run):
    code, output, _ = run(model=Closed())
    assert code == 2 and "Closed gives scores (54, " in output and "knows no unseen classes" in output
