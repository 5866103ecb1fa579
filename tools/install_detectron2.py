#!/usr/bin/env python
"""Install detectron2 on a machine that reaches only a Python package index.

detectron2 has no release on PyPI under its own name and its usual build needs a compiler. If ``import detectron2``
already works, whatever version that is, it is used as it is. Otherwise this tool takes the sources of detectron2 0.5
from a third party's sdist on PyPI, which a SHA-256 pins to the upstream files, adapts them to today's numpy, Pillow and
torchvision with the few edits of ``PATCHES``, packs them as a pure-Python wheel and installs that.

    python tools/install_detectron2.py                                  # download, build, install
    python tools/install_detectron2.py --sdist detectron2-cdo-0.5.tar.gz  # no index needed for the sources
    python tools/install_detectron2.py --no-install --wheel-dir dist      # only build the wheel
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

SDIST_NAME = "detectron2-cdo"
SDIST_VERSION = "0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
VERSION = "0.5+pypi.1"
# pip 26.3 refuses the sdist because one of its extras names a URL; setuptools runs the sdist's own metadata step.
DOWNLOAD_TOOLS = ("pip>=22.3,<26.3", "setuptools>=70.1")
NO_INDEX_HINT = "on a machine with no package index, pass --sdist FILE"

DIST_INFO = f"detectron2-{VERSION}.dist-info"
STUB_MODULE = "detectron2/_no_extension.py"
REQUIRES = (
    "torch",
    "torchvision",
    "numpy",
    "Pillow>=9.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5.post20210924,<0.1.6",
    "iopath>=0.1.7,<0.2",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)
# Folders of the sdist and where they go in the wheel; the projects are those that detectron2's own build installs.
PACKAGE_FOLDERS = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
PACKAGE_SUFFIXES = (".py", ".yaml")


class InstallError(RuntimeError):
    """Something the user can act on; the message is one line."""


@dataclass(frozen=True)
class Patch:
    """A regular-expression edit that must match exactly ``places[file]`` times in every file it names."""

    name: str
    pattern: str
    replacement: str
    places: dict[str, int]


PATCHES = (
    Patch(
        "numpy-alias",  # removed in numpy 1.24
        r"\bnp\.(int|float|bool|str)\b",
        r"\1",
        {
            "detectron2/data/build.py": 2,
            "detectron2/data/datasets/pascal_voc.py": 1,
            "detectron2/evaluation/pascal_voc_evaluation.py": 2,
            "detectron2/evaluation/sem_seg_evaluation.py": 7,
            "detectron2/structures/masks.py": 2,
            "detectron2/utils/video_visualizer.py": 1,
            "detectron2/utils/visualizer.py": 3,
        },
    ),
    Patch(
        "pillow-linear",  # removed in Pillow 10
        r"\bImage\.LINEAR\b",
        "Image.BILINEAR",
        {"detectron2/data/transforms/transform.py": 1},
    ),
    Patch(
        "importlib-resources",  # pkg_resources left setuptools
        r"^import pkg_resources$",
        "import importlib.resources",
        {"detectron2/model_zoo/model_zoo.py": 1},
    ),
    Patch(
        "importlib-resources",
        r"\bpkg_resources\.resource_filename\(\s*(\"[\w.]+\"), (os\.path\.join\([^()]*\))\s*\)",
        r"str(importlib.resources.files(\1).joinpath(\2))",
        {"detectron2/model_zoo/model_zoo.py": 1},
    ),
    Patch(
        "no-extension",
        r"^from detectron2 import _C$",
        "from detectron2._no_extension import _C",
        {
            "detectron2/evaluation/fast_eval_api.py": 1,
            "detectron2/layers/deform_conv.py": 1,
            "detectron2/layers/roi_align_rotated.py": 1,
            "detectron2/layers/rotated_boxes.py": 1,
        },
    ),
    Patch(
        "no-extension",
        r"^    return torch\.ops\.detectron2\.nms_rotated\(",
        "    from detectron2._no_extension import _C\n\n    return _C.nms_rotated(",
        {"detectron2/layers/nms.py": 1},
    ),
    Patch(
        "slow-coco-eval",  # the compiled evaluator's name stands for pycocotools' own, with the same numbers
        r"^class COCOeval_opt\(",
        "COCOeval_opt = COCOeval\n\n\nclass _CompiledCOCOeval(",
        {"detectron2/evaluation/fast_eval_api.py": 1},
    ),
    Patch(
        "slow-coco-eval",
        r"^( +self\._use_fast_impl) = use_fast_impl$",
        r"\1 = use_fast_impl and COCOeval_opt is not COCOeval",
        {"detectron2/evaluation/coco_evaluation.py": 1},
    ),
    Patch(
        "caffe2-optional",  # torch no longer ships caffe2
        r"^from \.api import \*$",
        "try:\n    import caffe2\nexcept ImportError:\n    pass\nelse:\n    from .api import *",
        {"detectron2/export/__init__.py": 1},
    ),
)

STUB_SOURCE = f'''\
# Not part of upstream detectron2: added by the pure-Python build {VERSION}, which has no detectron2._C.
class _NoExtension:
    """Stands where the compiled operators would be; using one says which is missing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"detectron2's compiled operator '{{name}}' is not available: this is the pure-Python build {VERSION}. "
            "Build detectron2 from source to use it."
        )


_C = _NoExtension()
'''


def installed_version() -> str | None:
    """The version of the detectron2 that imports here, or None."""
    try:
        return str(importlib.import_module("detectron2").__version__)
    except Exception as error:  # a broken install can raise anything; it is then replaced
        if not (isinstance(error, ModuleNotFoundError) and error.name == "detectron2"):
            print(f"detectron2 is there but does not import ({_one_line(error)}): replacing it")
        return None


def download_sdist(folder: Path) -> Path:
    """Fetch the pinned sdist from the package index that pip is set up for.

    An older pip is used for this from a temporary folder, so that the environment's own stays untouched.
    """
    _require_torch()
    tools = folder / "tools"
    _run_pip(
        ["install", "--quiet", "--target", str(tools), *DOWNLOAD_TOOLS],
        doing=f"fetch a pip that takes the sdist ({NO_INDEX_HINT})",
    )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST_NAME}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--require-hashes", "--dest", str(folder)]
    _run_pip(
        ["download", *options, "--requirement", str(requirements)],
        doing=f"download {SDIST_NAME}=={SDIST_VERSION} ({NO_INDEX_HINT})",
        python_path=tools,
    )
    found = sorted(folder.glob("*.tar.gz"))
    if len(found) != 1:
        raise InstallError(f"pip downloaded {len(found)} archives to {folder}, expected one .tar.gz")
    return found[0]


def read_sdist(sdist: Path, *, sha256: str) -> dict[str, bytes]:
    """Check the sdist's hash and return the wheel's files by their path in the wheel, LICENSE included."""
    try:
        digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    except OSError as error:
        raise InstallError(f"cannot read the sdist {sdist}: {error.strerror}") from error
    if digest != sha256:
        raise InstallError(f"the sdist {sdist} has SHA-256 {digest}, expected {sha256}: not using it")

    files: dict[str, bytes] = {}
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive.getmembers():
                inner = member.name.partition("/")[2]  # without the top folder
                target = _wheel_path(inner)
                if target is not None and member.isfile():
                    files[target] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InstallError(f"the sdist {sdist} is not a readable .tar.gz: {_one_line(error)}") from error

    for required in ("detectron2/__init__.py", f"{DIST_INFO}/LICENSE"):
        if required not in files:
            raise InstallError(f"the sdist {sdist} holds no {Path(required).name} of detectron2")
    return files


def apply_patches(files: dict[str, bytes], patches: tuple[Patch, ...] = PATCHES) -> dict[str, list[str]]:
    """Edit ``files`` in place and mark each edited one; returns the patch names by file."""
    edited: dict[str, list[str]] = {}
    for patch in patches:
        for path, expected in patch.places.items():
            if path not in files:
                raise InstallError(f"patch {patch.name}: the sources have no {path}")
            text, count = re.subn(patch.pattern, patch.replacement, files[path].decode(), flags=re.MULTILINE)
            if count != expected:
                raise InstallError(f"patch {patch.name}: {path} has {count} places, expected {expected}")
            files[path] = text.encode()
            edited.setdefault(path, [])
            if patch.name not in edited[path]:
                edited[path].append(patch.name)
    for path, names in edited.items():  # Apache-2.0, section 4(b): modified files carry a notice
        notice = f"# This file was modified for detectron2 {VERSION} ({', '.join(names)}).\n"
        files[path] = notice.encode() + files[path]
    return edited


def build_wheel(files: dict[str, bytes], wheel_dir: Path, *, modifications: dict[str, list[str]]) -> Path:
    """Write the wheel of ``files`` with its metadata; the same input gives the same bytes."""
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: detectron2 0.5 as a pure-Python wheel for current torch, numpy and Pillow",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.9",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    wheel = ["Wheel-Version: 1.0", "Generator: install_detectron2", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    changes = ["Files that differ from detectron2 0.5, and the edits made to them:", ""]
    changes += [f"{path}: {', '.join(names)}" for path, names in sorted(modifications.items())]
    changes += [f"{STUB_MODULE}: added"]
    contents = {
        **files,
        STUB_MODULE: STUB_SOURCE.encode(),
        f"{DIST_INFO}/METADATA": _lines(metadata),
        f"{DIST_INFO}/WHEEL": _lines(wheel),
        f"{DIST_INFO}/MODIFICATIONS.txt": _lines(changes),
    }
    record_path = f"{DIST_INFO}/RECORD"
    record = [f"{path},sha256={_record_hash(data)},{len(data)}" for path, data in sorted(contents.items())]
    contents[record_path] = _lines([*record, f"{record_path},,"])

    wheel_dir.mkdir(parents=True, exist_ok=True)
    target = wheel_dir / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in sorted(contents.items(), key=lambda item: (item[0].startswith(DIST_INFO), item[0])):
            info = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return target


def install_wheel(wheel: Path) -> None:
    """pip-install the wheel and prove in a new process that it imports."""
    _run_pip(["install", "--quiet", str(wheel)], doing=f"install {wheel.name}")
    check = "import detectron2, detectron2.modeling, detectron2.evaluation, detectron2.engine"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode != 0:
        raise InstallError(f"detectron2 {VERSION} was installed but does not import: {_last_line(done.stderr)}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sdist", type=Path, metavar="FILE", help=f"{SDIST_NAME}-{SDIST_VERSION}.tar.gz, not downloaded"
    )
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="keep the built wheel in this folder")
    parser.add_argument(
        "--no-install", action="store_true", help="only build the wheel (in the current folder by default)"
    )
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="install_detectron2_") as scratch:
            _run(args, Path(scratch))
    except InstallError as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace, scratch: Path) -> None:
    if not args.no_install:
        version = installed_version()
        if version is not None:
            print(f"detectron2 {version} is already installed: using it as it is")
            return
        _require_torch()

    if args.sdist is None:
        print(f"downloading the sources of detectron2 {SDIST_VERSION}")
    files = read_sdist(args.sdist or download_sdist(scratch), sha256=SDIST_SHA256)
    modifications = apply_patches(files)
    wheel_dir = args.wheel_dir or (Path.cwd() if args.no_install else scratch)
    try:
        wheel = build_wheel(files, wheel_dir, modifications=modifications)
    except OSError as error:
        raise InstallError(f"cannot write the wheel to {wheel_dir}: {error.strerror}") from error
    if args.no_install:
        print(f"built {wheel}")
        return
    install_wheel(wheel)
    print(f"detectron2 {VERSION} installed")


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise InstallError(f"torch is not installed for {sys.executable}: install torch and torchvision first")


def _wheel_path(path: str) -> str | None:
    """Where a file of the sdist goes in the wheel, None for a file that is not part of it."""
    if path == "LICENSE":
        return f"{DIST_INFO}/LICENSE"
    if path.endswith(PACKAGE_SUFFIXES):
        for folder, target in PACKAGE_FOLDERS.items():
            if path.startswith(folder):
                return target + path.removeprefix(folder)
    return None


def _run_pip(arguments: list[str], *, doing: str, python_path: Path | None = None) -> None:
    """Run pip with this interpreter, with the packages of ``python_path`` before its own."""
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if python_path is not None:
        env["PYTHONPATH"] = str(python_path)
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise InstallError(f"the index's {SDIST_NAME}=={SDIST_VERSION} has another SHA-256 than {SDIST_SHA256}")
        raise InstallError(f"cannot {doing}: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    """The last line of pip's or Python's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _lines(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
