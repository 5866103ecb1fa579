#!/usr/bin/env python
"""Write CLIP's byte-pair merges that the captions of OVShapes need: the tiny CLIPs' tokenizer.

Words of the captions and the templates stay whole as in CLIP; every other word falls into smaller pieces, down to
bytes, so any text can still be encoded.
"""

from __future__ import annotations

import argparse
import gzip
from itertools import pairwise
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer, default_bpe

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_captions import CAPTION_TEMPLATES
from ovseg_d2.data.datasets.ovshapes_scene import COLORS, SHAPES

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "ovseg_d2" / "model_zoo" / "ovshapes_bpe.txt.gz"


def pieces(tokenizer: SimpleTokenizer, words: list[str]) -> set[str]:
    """All pieces, final and intermediate, of the merges that build ``words``."""
    needed: set[str] = set()
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = enumerate(pairwise(symbols))
            ranked = [(tokenizer.bpe_ranks[pair], i) for i, pair in pairs if pair in tokenizer.bpe_ranks]
            if not ranked:
                break
            _, i = min(ranked)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            needed.add(symbols[i])
    return needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    args = parser.parse_args()

    full = SimpleTokenizer()
    sentences = [template.format(" ") for template in CAPTION_TEMPLATES]
    sentences += [*CLASS_NAMES, *COLORS, *SHAPES, "red star, blue ring and grass"]
    words = sorted({word for sentence in sentences for word in full.pat.findall(sentence.lower())})
    needed = pieces(full, words)
    merges = [" ".join(pair) for pair in full.bpe_ranks if "".join(pair) in needed]
    header = gzip.open(default_bpe()).read().decode().split("\n")[0]
    # mtime 0: the same merges give the same bytes.
    args.output.write_bytes(gzip.compress("\n".join([header, *merges]).encode(), mtime=0))

    trimmed = SimpleTokenizer(bpe_path=str(args.output))
    for sentence in sentences:
        kept = [trimmed.decoder[i] for i in trimmed.encode(sentence)]
        expected = [full.decoder[i] for i in full.encode(sentence)]
        if kept != expected:
            raise SystemExit(f"{sentence!r}: {kept}, expected {expected}")
    print(f"{args.output}: {len(merges)} merges, {trimmed.vocab_size} tokens")


if __name__ == "__main__":
    main()
