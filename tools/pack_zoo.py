#!/usr/bin/env python
"""Put trained weights into the package's model zoo: half precision, safetensors, and the list of SHA-256 sums.

    python tools/pack_zoo.py --proposals output/ovshapes_proposals/model_final.pth
    python tools/pack_zoo.py                       # only write the sums of what is there anew

Of a checkpoint only the mask generator is kept, without its classifier: CLIP has a file of its own, and names
are what each method learns anew. tools/pretrain_tiny_clip.py --export writes the CLIPs.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from safetensors.torch import save_file

from ovseg_d2.checkpoint.io import read_state_dict

ZOO = Path(__file__).resolve().parents[1] / "ovseg_d2" / "model_zoo"
SCOPE = "proposals."
CLASS_HEAD = "proposals.mask_decoder.class_embed."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=Path, metavar="FILE", help="checkpoint of a training")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="folder; default: the package's")
    args = parser.parse_args()
    if args.proposals:
        pack_proposals(args.proposals, args.zoo / "ovshapes_proposals.safetensors")
    write_sums(args.zoo)


def pack_proposals(source: Path, target: Path) -> None:
    """Copy the tensors below ``proposals.`` of a checkpoint but those of the class head, floats as float16.

    Raises:
        ValueError: there are none.
    """
    weights = read_state_dict(source)
    state = {k: v for k, v in weights.items() if k.startswith(SCOPE) and not k.startswith(CLASS_HEAD)}
    if not state:
        raise ValueError(f"{source}: no tensor below {SCOPE!r}")
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    save_file(halves, target, {"format": "pt"})
    target.chmod(0o644)  # safetensors makes files that only their owner can read
    print(f"{target}: {len(halves)} tensors, {target.stat().st_size / 2**20:.1f} MiB")


def write_sums(zoo: Path) -> None:
    """Write SHA256SUMS, as `sha256sum --check` reads it."""
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(zoo.glob("*.safetensors"))
    ]
    (zoo / "SHA256SUMS").write_text("".join(lines))
    print("".join(lines), end="")


if __name__ == "__main__":
    main()
