"""tools/install_detectron2.py on made-up sources: no network, no real detectron2, nothing is installed."""

import base64
import csv
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools/install_detectron2.py"

# A line for each kind of place that a patch edits, in our own words.
LINES = {
    "numpy-alias": "value = np.zeros(3, dtype=np.bool)  # place {index}",
    "pillow-linear": "interp = Image.LINEAR",
    "importlib-resources": (
        "import pkg_resources\n\nfile = pkg_resources.resource_filename(\n"
        '    "detectron2.model_zoo", os.path.join("configs", name)\n)'
    ),
    "no-extension": "from detectron2 import _C",
    "slow-coco-eval": "",
    "caffe2-optional": "from .api import *",
}
SPECIAL = {
    "detectron2/layers/nms.py": "def nms_rotated(boxes):\n    return torch.ops.detectron2.nms_rotated(boxes)",
    "detectron2/evaluation/fast_eval_api.py": (
        "from base import COCOeval\nfrom detectron2 import _C\n\n\nclass COCOeval_opt(COCOeval):\n    pass"
    ),
    "detectron2/evaluation/coco_evaluation.py": (
        "class Evaluator:\n    def __init__(self, use_fast_impl):\n        self._use_fast_impl = use_fast_impl"
    ),
}


@pytest.fixture
def tool() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def fake_sources(tool) -> dict[str, str]:
    """Files of an sdist with exactly the places that the patches expect."""
    files = {"LICENSE": "the licence", "detectron2/__init__.py": '__version__ = "0.5"', "setup.py": "raise SystemExit"}
    for patch in tool.PATCHES:
        for path, count in patch.places.items():
            text = SPECIAL.get(path) or "\n".join(LINES[patch.name].format(index=i) for i in range(count))
            files[path] = f"# header\n{text}\n"
    files["detectron2/model_zoo/configs/a.yaml"] = "A: 1"
    files["projects/PointRend/point_rend/__init__.py"] = "point = 1"
    files["projects/TensorMask/tensormask/__init__.py"] = "not = packaged"
    files["tools/train_net.py"] = "not = packaged"
    return files


def write_sdist(path: Path, files: dict[str, str]) -> str:
    """Write the archive, return its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"detectron2-0.5/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def sdist(tool, tmp_path, monkeypatch) -> Path:
    """A made-up sdist that the tool takes for the pinned one."""
    path = tmp_path / "sdist.tar.gz"
    write_sdist(path, fake_sources(tool))
    accept(tool, path, monkeypatch)
    return path


def accept(tool, path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "SDIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def build(tool, sdist: Path, folder: Path) -> dict[str, bytes]:
    """The contents of the wheel that the command line builds."""
    assert tool.main(["--sdist", str(sdist), "--no-install", "--wheel-dir", str(folder)]) == 0
    (wheel,) = folder.iterdir()
    assert wheel.name == "detectron2-0.5+pypi.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def error_of(tool, capsys, *arguments: str) -> str:
    """Run the tool, expect a failure, return its one line."""
    assert tool.main(list(arguments)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("install_detectron2: error: ")
    return lines[0]


def test_what_is_pinned(tool):
    assert tool.SDIST_SHA256 == "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
    assert (tool.SDIST_NAME, tool.SDIST_VERSION, tool.VERSION) == ("detectron2-cdo", "0.5", "0.5+pypi.1")
    aliases = next(patch for patch in tool.PATCHES if patch.name == "numpy-alias")
    assert sum(aliases.places.values()) == 18


def test_wheel_holds_the_package_and_its_licence(tool, sdist, tmp_path):
    wheel = build(tool, sdist, tmp_path / "wheels")
    assert wheel["detectron2/projects/point_rend/__init__.py"] == b"point = 1"
    assert wheel["detectron2/model_zoo/configs/a.yaml"] == b"A: 1"
    assert wheel["detectron2-0.5+pypi.1.dist-info/LICENSE"] == b"the licence"
    assert not [name for name in wheel if "tensormask" in name or "tools" in name or name.endswith("setup.py")]
    assert not [name for name in wheel if name.startswith("detectron2/_C")]
    assert b'__version__ = "0.5"' in wheel["detectron2/__init__.py"]
    metadata = wheel["detectron2-0.5+pypi.1.dist-info/METADATA"].decode()
    assert "Name: detectron2\nVersion: 0.5+pypi.1\n" in metadata
    assert "Requires-Dist: fvcore>=0.1.5.post20210924,<0.1.6\n" in metadata
    assert not re.search("Requires-Dist: (black|future|pydot)", metadata)


def test_record_is_right(tool, sdist, tmp_path):
    wheel = build(tool, sdist, tmp_path / "wheels")
    record = wheel.pop("detectron2-0.5+pypi.1.dist-info/RECORD").decode()
    rows = {path: (digest, size) for path, digest, size in csv.reader(record.splitlines())}
    assert rows.pop("detectron2-0.5+pypi.1.dist-info/RECORD") == ("", "")
    assert rows.keys() == wheel.keys()
    for path, (digest, size) in rows.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(wheel[path]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(wheel[path]))


def test_pip_takes_the_wheel(tool, sdist, tmp_path):
    build(tool, sdist, tmp_path / "wheels")
    (wheel,) = (tmp_path / "wheels").iterdir()
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run(command, check=True)
    assert (target / "detectron2/__init__.py").is_file()
    assert (target / "detectron2-0.5+pypi.1.dist-info/LICENSE").is_file()


def test_same_sources_give_the_same_bytes(tool, sdist, tmp_path):
    build(tool, sdist, tmp_path / "a")
    build(tool, sdist, tmp_path / "b")
    (a,), (b,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    assert a.read_bytes() == b.read_bytes()


def test_edits_and_their_marks(tool, sdist, tmp_path):
    wheel = build(tool, sdist, tmp_path / "wheels")
    text = {name: data.decode() for name, data in wheel.items()}
    assert "dtype=bool)  # place 1" in text["detectron2/data/build.py"]
    assert "interp = Image.BILINEAR" in text["detectron2/data/transforms/transform.py"]
    zoo = text["detectron2/model_zoo/model_zoo.py"]
    assert "import importlib.resources\n" in zoo and "pkg_resources" not in zoo
    assert 'str(importlib.resources.files("detectron2.model_zoo").joinpath(os.path.join("configs", name)))' in zoo
    assert "from detectron2 import _C" not in "".join(text.values())

    edited = {path for patch in tool.PATCHES for path in patch.places}
    for name, source in fake_sources(tool).items():
        if name in edited:
            first, rest = text[name].split("\n", 1)
            assert first.startswith("# This file was modified for detectron2 0.5+pypi.1 (")
            assert all(patch.name in first for patch in tool.PATCHES if name in patch.places)
            assert rest != source
            assert f"\n{name}: " in text["detectron2-0.5+pypi.1.dist-info/MODIFICATIONS.txt"]
        elif name in text:
            assert text[name] == source
    for name in edited:
        compile(text[name], name, "exec")


def test_compiled_operators_say_what_is_missing(tool, sdist, tmp_path):
    wheel = build(tool, sdist, tmp_path / "wheels")
    namespace: dict = {}
    exec(wheel["detectron2/_no_extension.py"], namespace)
    with pytest.raises(ImportError, match="compiled operator 'box_iou_rotated' is not available"):
        namespace["_C"].box_iou_rotated()
    assert not hasattr(namespace["_C"], "__wrapped__")  # introspection goes on working

    base = types.SimpleNamespace(COCOeval=type("COCOeval", (), {}))
    source = wheel["detectron2/evaluation/fast_eval_api.py"].decode().replace("from base import COCOeval", "")
    namespace["COCOeval"] = base.COCOeval
    exec(source.replace("from detectron2._no_extension import _C", ""), namespace)
    assert namespace["COCOeval_opt"] is base.COCOeval
    exec(wheel["detectron2/evaluation/coco_evaluation.py"], namespace)
    assert namespace["Evaluator"](True)._use_fast_impl is False


def test_another_hash_is_refused(tool, tmp_path, capsys):
    digest = write_sdist(tmp_path / "other.tar.gz", fake_sources(tool))
    error = error_of(tool, capsys, "--sdist", str(tmp_path / "other.tar.gz"), "--no-install")
    assert f"has SHA-256 {digest}, expected {tool.SDIST_SHA256}" in error


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "detectron2/data/build.py",
            "x = np.int(3)\n",
            "patch numpy-alias: detectron2/data/build.py has 3 places, expected 2",
        ),
        ("detectron2/layers/nms.py", None, "patch no-extension: the sources have no detectron2/layers/nms.py"),
        ("LICENSE", None, "holds no LICENSE of detectron2"),
        ("detectron2/__init__.py", None, "holds no __init__.py of detectron2"),
    ],
)
def test_other_sources_are_refused(tool, tmp_path, monkeypatch, capsys, path, change, message):
    files = fake_sources(tool)
    if change is None:
        del files[path]
    else:
        files[path] += change
    write_sdist(tmp_path / "other.tar.gz", files)
    accept(tool, tmp_path / "other.tar.gz", monkeypatch)
    wheels = tmp_path / "wheels"
    assert message in error_of(
        tool, capsys, "--sdist", str(tmp_path / "other.tar.gz"), "--no-install", "--wheel-dir", str(wheels)
    )
    assert not wheels.exists()


@pytest.mark.parametrize("content", [b"no archive", b"\x1f\x8b\x08\x00 broken"])
def test_an_unreadable_archive_is_named(tool, tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "broken.tar.gz"
    path.write_bytes(content)
    accept(tool, path, monkeypatch)
    assert f"the sdist {path} is not a readable .tar.gz" in error_of(tool, capsys, "--sdist", str(path), "--no-install")


def test_a_missing_file_is_named(tool, tmp_path, capsys):
    path = tmp_path / "none.tar.gz"
    assert f"cannot read the sdist {path}: No such file" in error_of(tool, capsys, "--sdist", str(path), "--no-install")


def test_a_wheel_folder_that_cannot_be_written_is_named(tool, sdist, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = error_of(tool, capsys, "--sdist", str(sdist), "--no-install", "--wheel-dir", str(tmp_path / "file"))
    assert f"cannot write the wheel to {tmp_path / 'file'}" in error


@pytest.fixture
def without_detectron2(tool, monkeypatch):
    monkeypatch.setattr(tool, "installed_version", lambda: None)


@pytest.fixture
def pip(monkeypatch) -> list[list[str]]:
    """Collects the commands that would run; each succeeds and does nothing."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def failing(message: str):
    return lambda command, **_: subprocess.CompletedProcess(command, 1, "", message)


def test_an_importable_detectron2_is_used_as_it_is(tool, monkeypatch, capsys, pip):
    monkeypatch.setitem(sys.modules, "detectron2", types.SimpleNamespace(__version__="0.6"))
    assert tool.main([]) == 0
    assert capsys.readouterr().out == "detectron2 0.6 is already installed: using it as it is\n"
    assert pip == []


def test_a_broken_detectron2_is_replaced(tool, monkeypatch, tmp_path, capsys):
    (tmp_path / "detectron2.py").write_text("raise ImportError('its compiled part does not load')")
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tool.installed_version() is None
    assert "does not import (ImportError: its compiled part does not load): replacing it" in capsys.readouterr().out


def test_the_wheel_is_installed_with_its_requirements(tool, sdist, without_detectron2, pip, capsys):
    assert tool.main(["--sdist", str(sdist)]) == 0
    install, check = pip
    assert install[:4] == [sys.executable, "-m", "pip", "install"] and install[-1].endswith("-py3-none-any.whl")
    assert "--no-deps" not in install
    assert "import detectron2" in check[-1]
    assert capsys.readouterr().out.endswith("detectron2 0.5+pypi.1 installed\n")


def test_the_download_is_pinned(tool, sdist, tmp_path, monkeypatch):
    commands = []

    def run(command, env, **_):
        commands.append((command, env))
        if "download" in command:
            requirements = Path(command[command.index("--requirement") + 1]).read_text()
            assert requirements == f"detectron2-cdo==0.5 --hash=sha256:{tool.SDIST_SHA256}\n"
            (Path(command[command.index("--dest") + 1]) / "a.tar.gz").write_bytes(sdist.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert tool.read_sdist(tool.download_sdist(scratch), sha256=tool.SDIST_SHA256)
    (fetch_pip, _), (download, env) = commands
    assert "pip>=22.3,<26.3" in fetch_pip and "--target" in fetch_pip  # the environment's own pip is left alone
    assert {"--no-deps", "--no-build-isolation", "--require-hashes"} <= set(download)
    assert env["PYTHONPATH"] == fetch_pip[fetch_pip.index("--target") + 1]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for pip", "No matching distribution found for pip"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  Got 12",
            "has another SHA-256 than",
        ),
        ("/usr/bin/python: No module named pip", "No module named pip"),
    ],
)
def test_a_failing_download_is_one_line(tool, without_detectron2, monkeypatch, capsys, output, message):
    monkeypatch.setattr(subprocess, "run", failing(output))
    assert message in error_of(tool, capsys)


@pytest.mark.parametrize("step", ["install", "download"])
def test_a_machine_without_an_index_is_told_of_the_option(tool, without_detectron2, monkeypatch, capsys, step):
    def run(command, **_):
        return subprocess.CompletedProcess(command, int(step in command), "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    error = error_of(tool, capsys)
    assert "pass --sdist FILE" in error and error.endswith("): No matching distribution found")


def test_a_missing_torch_is_named(tool, sdist, without_detectron2, monkeypatch, capsys, pip):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    assert "torch is not installed" in error_of(tool, capsys, "--sdist", str(sdist))
    assert "torch is not installed" in error_of(tool, capsys, "--no-install")
    assert pip == []


def test_an_install_that_fails_or_does_not_import_is_named(tool, sdist, without_detectron2, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", failing("ERROR: No space left"))
    assert "cannot install detectron2-0.5+pypi.1-py3-none-any.whl: No space left" in error_of(
        tool, capsys, "--sdist", str(sdist)
    )

    def run(command, **_):
        return subprocess.CompletedProcess(command, int("-c" in command), "", "Traceback\nImportError: no fvcore")

    monkeypatch.setattr(subprocess, "run", run)
    assert "was installed but does not import: ImportError: no fvcore" in error_of(tool, capsys, "--sdist", str(sdist))
