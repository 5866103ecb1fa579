"""Packaging of ovseg_d2."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "ovseg_d2/__init__.py").read_text(), re.MULTILINE).group(1)

setup(
    name="ovseg_d2",
    version=VERSION,
    description="Open-vocabulary image segmentation on Detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["ovseg_d2", "ovseg_d2.*"]),
    include_package_data=True,
    package_data={"ovseg_d2": ["**/*.json", "model_zoo/*"]},
    python_requires=">=3.10",
    # detectron2 has no release on PyPI under its own name, so it cannot be required here:
    # tools/install_detectron2.py installs it where it is missing.
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "numpy",
        "Pillow>=9.1",
        "PyYAML",
        "fvcore>=0.1.5.post20210924,<0.1.6",
        "opencv-python-headless",
        "pycocotools>=2.0.2",
        "open_clip_torch>=3.0,<4",
        "safetensors>=0.4",
        "scipy>=1.9",
        "tabulate",
        "tensorboard",
        "timm>=1.0.15",
        "tqdm",
    ],
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "ruff==0.17.*", "torchmetrics>=1.4", "transformers>=5"],
        # SAM as a mask generator.
        "sam": ["transformers>=5"],
        # SegFormer's Mix Transformer as a backbone.
        "mit": ["transformers>=5"],
        # Apart because it brings a backport of the standard library's typing.
        "cityscapes": ["cityscapesScripts>=2.2"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
    ],
)
