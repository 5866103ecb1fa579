"""Prompt templates: sentences with one ``{}`` for the class name, in named sets."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

_SIZES = ("small", "medium", "large")

#: 14 of ViLD (arXiv 2104.13921) as FC-CLIP, MAFT, ZSSeg, FreeSeg and MaskCLIP++ use them: some without a full stop.
VILD = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(f"a photo of a {size} {{}}." for size in _SIZES),
    *(f"This is a photo of a {size} {{}}." for size in _SIZES),
    *(f"There is a {size} {{}} in the scene." for size in _SIZES),
)

#: 8 of ZegFormer for its queries: the seven best of CLIP's ImageNet templates, and a scene.
ZEGFORMER_QUERY = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "A photo of a {} in the scene",
)

#: 32 of ZegFormer for masked and cropped regions.
ZEGFORMER_REGION = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    *(
        f"This is a {kind}photo of a {size}{{}}"
        for kind in ("", "masked ", "cropped ")
        for size in ("", *(f"{size} " for size in _SIZES))
    ),
    "A photo of a {} in the scene",
    "a bad photo of the {} in the scene",
    "a photo of the large {} in the scene",
    "a photo of the small {} in the scene",
    "a cropped photo of a {} in the scene",
    "a photo of a masked {} in the scene",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "This is a {} in the scene",
    "This is the {} in the scene",
    "This is one {} in the scene",
    "There is a masked {} in the scene",
    "There is the masked {} in the scene",
    "This is a masked {} in the scene",
    "This is the masked {} in the scene",
    "This is one masked {} in the scene",
)

#: 15 of ZegCLIP for COCO-Stuff.
ZEGCLIP = (
    "a photo of a {}.",
    *(f"a photo of a {size} {{}}." for size in _SIZES),
    "This is a photo of a {}.",
    *(f"This is a photo of a {size} {{}}." for size in _SIZES),
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "single": ("a photo of a {}.",),  # MaskCLIP++ "t1"
    "vild": VILD,  # MAFT, MaskCLIP++ "t14", FC-CLIP
    "imagenet": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),  # MaskCLIP++ "t80", CAT-Seg
    "zegformer_query": ZEGFORMER_QUERY,
    "zegformer_region": ZEGFORMER_REGION,
    "zsseg": ("a sculpture of a {}.",),
    "fga_seg": ("A photo of a {} in the scene",),
    "zegclip": ZEGCLIP,
    "zegclip_voc": ("a photo of a {}",),
    "ldvc": ("this is a photo of a {}",),  # six tokens, as many as LDVC's deep text prompts
}


def get_templates(names: Sequence[str], *, key: str = "MODEL.OVSEG.TEXT.TEMPLATES") -> tuple[str, ...]:
    """The templates of a key: each entry the name of a set, or a sentence with one ``{}``.

    Raises:
        ValueError: an entry that is neither, or no entry at all.
    """
    if not names:
        raise ValueError(f"{key} is empty; expected names of sets or sentences with '{{}}'")
    templates: list[str] = []
    for name in names:
        if name in TEMPLATE_SETS:
            templates += TEMPLATE_SETS[name]
        elif name.count("{}") == 1:
            templates.append(name)
        else:
            raise ValueError(
                f"{key}: {name!r} is neither a set ({', '.join(TEMPLATE_SETS)}) nor a sentence with one '{{}}'"
            )
    return tuple(templates)
