"""What the README and the other pages tell people to type works: commands parse, files, keys and links exist, the
README's Python and YAML run."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from ovseg_d2.checkpoint.catalogue import PREFIX, catalogue
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.check import require_registered
from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from ovseg_d2.engine import default_argument_parser, load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *(ROOT / folder / "README.md" for folder in ("demo", "datasets", "ovseg_d2/model_zoo")),
    )
}
# Stand for a file of the reader's.
PLACEHOLDERS = {"CONFIG.yaml", "FILE.yaml", "OTHER.yaml", "configs/ovshapes/dense_adapter.yaml"}
# Programs whose options are in part those of a shared module.
SHARED_OPTIONS = (ROOT / "ovseg_d2" / "data" / "datasets" / "conversion.py").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(start, texts=(README,)):
    """Commands of bash blocks that begin so, each once; what follows ``&&`` is a command of its own."""
    lines = "\n".join(block for text in texts for block in blocks("bash", text)).replace("\\\n", " ").splitlines()
    parts = [re.split(r"\s#", part)[0].strip() for line in lines for part in line.split(" && ")]
    return list(dict.fromkeys(part for part in parts if part.startswith(start)))


def anchors(text):
    """Of a page's headings, as they are made where such pages are shown."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module", autouse=True)
def quick_yaml():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        yield


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """A folder with the files that a reader brings; gives the path of a configuration there or in the project."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    for split in ("train", "val"):
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup", "isthing": 1}]}
        (tmp_path / "mine" / f"{split}.json").write_text(json.dumps(content))
    (text,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(text.replace("configs/", f"{ROOT}/configs/"))
    return lambda name: (tmp_path if str(name) == "mine.yaml" else ROOT) / name


@pytest.fixture
def no_class_texts(monkeypatch):
    """Synonyms are a reader's file, and would stay with the dataset for other tests."""

    def attach(entries):
        for name, _file in entries:
            require_registered(name)

    monkeypatch.setattr(sys.modules[load_config.__module__], "attach_class_texts", attach)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", PAGES[page])
    for target, anchor in links:
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.split()[1] for command in commands("make", PAGES.values())]
    assert {"quickstart", "test", "setup"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_extras_exist():
    named = {extra for text in PAGES.values() for extra in re.findall(r"'\.\[(\w+)\]'", text)}
    assert named and all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in named)


@pytest.mark.parametrize("command", commands("python train_net.py", PAGES.values()))
def test_training_commands(command, own_files, no_class_texts):
    args = default_argument_parser().parse_args(shlex.split(command)[2:])
    if args.config_file in PLACEHOLDERS:
        assert len(args.opts) % 2 == 0
        return
    cfg = load_config(own_files(args.config_file), args.opts)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        require_registered(name)


@pytest.mark.parametrize("command", commands("python demo/demo.py", PAGES.values()))
def test_demo_commands(command, own_files, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    import demo

    args = demo.parse_args(shlex.split(command)[2:])
    assert (
        args.config_file in PLACEHOLDERS or load_config(own_files(args.config_file), args.opts).MODEL.META_ARCHITECTURE
    )
    if args.vocabulary:
        assert len(demo.chosen_vocabulary(args)) > 1


@pytest.mark.parametrize("command", commands(("python tools/", "python datasets/", "python tests/"), PAGES.values()))
def test_other_programs_exist_and_have_these_options(command, own_files):
    program, *words = shlex.split(command)[1:]
    source = (ROOT / program).read_text() + SHARED_OPTIONS
    assert [word for word in words if word.startswith("--") and word != "--help" and f'"{word}"' not in source] == []
    for option, value in zip(words, words[1:], strict=False):
        if option == "--config-file" and value not in PLACEHOLDERS:
            assert own_files(value).is_file()
        if option in ("--dataset", "--datasets"):
            require_registered(value)
    tables = [word for word in words if word.startswith("tools/tables/")]
    assert all((ROOT / table).is_file() for table in tables)


def test_checked_datasets_are_registered():
    for command in commands("python -m ovseg_d2.data.check", PAGES.values()):
        for name in shlex.split(command)[3:]:
            require_registered(name)


def test_catalogue_has_what_is_named():
    named = {name for text in PAGES.values() for name in re.findall(rf"{PREFIX}(\w+)", text)} - {"NAME"}
    assert named and named <= catalogue().keys()


def keys(node, prefix=""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from keys(value, f"{prefix}{key}.")


@pytest.mark.parametrize("page", PAGES)
def test_keys_exist(page):
    """Whole, without what is before them, or with a letter for a section (`F` is `MODEL.OVSEG.FGA_SEG`)."""
    cfg = get_cfg()
    add_ovseg_config(cfg)
    known = set(keys(cfg))
    text = PAGES[page]
    letters = dict(re.findall(r"`([A-Z])` is\s+`(MODEL[\w.]+)`", text))
    for word in re.findall(r"(?<![\w./-])([A-Z][A-Z_0-9]*(?:\.[A-Z][A-Z_0-9]+)+)", text):
        first, _, rest = word.partition(".")
        key = f"{letters[first]}.{rest}" if first in letters else word
        assert key in known or any(name.endswith(f".{key}") for name in known), word


@pytest.mark.parametrize("command", commands("python tools/visualize", PAGES.values()))
def test_commands_of_figures(command, own_files):
    tool = importlib.import_module(f"tools.{Path(command.split()[1]).stem}")
    args = tool.parse_args(shlex.split(command)[2:])
    assert load_config(own_files(args.config_file), args.opts).MODEL.META_ARCHITECTURE


def test_yaml_for_own_data(own_files):
    (text,) = blocks("yaml")
    assert {entry["kind"] for entry in yaml.safe_load(text)["DATASETS"]["REGISTER"]} == {"panoptic"}
    assert load_config(own_files("mine.yaml")).DATASETS.TRAIN == ("mine_train",)


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
