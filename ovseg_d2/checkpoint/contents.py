"""What a checkpoint is of, told by the names in it: files that stand under the wrong key are refused in words."""

from __future__ import annotations

from collections.abc import Iterable

_GENERATOR_KEY = "MODEL.OVSEG.PROPOSALS.WEIGHTS"
_CLIP_KEY = "MODEL.OVSEG.CLIP.PRETRAINED"


def require_clip(names: Iterable[str], layout: str, *, key: str, source: str) -> None:
    """
    Args:
        names: converted to ours.
        layout: what :func:`convert_state_dict` says of them.
        key: where the file stands.

    Raises:
        ValueError: a mask generator without CLIP.
    """
    names = set(names)
    if _has(names, "proposals.") and not _has_clip(names):
        raise ValueError(
            f"{key}: {source} holds a mask generator{_of(layout)} and no CLIP; it belongs in {_GENERATOR_KEY}"
        )


def require_generator(names: Iterable[str], layout: str, *, key: str, source: str) -> None:
    """Arguments as above.

    Raises:
        ValueError: a CLIP, tuned or not, without mask generator.
    """
    names = set(names)
    if _has(names, "proposals.") or not _has_clip(names):
        return
    if _has(names, "similarity.", "clip."):
        place = f"MODEL.WEIGHTS, or, for its CLIP alone, in {_CLIP_KEY}"
    else:
        place = f"{_CLIP_KEY}, or, as the generator's own, in MODEL.OVSEG.PROPOSALS.CLIP_PRETRAINED"
    raise ValueError(f"{key}: {source} holds a CLIP{_of(layout)} and no mask generator; it belongs in {place}")


def require_tuned_clip(names: Iterable[str], layout: str, *, similarity: bool, key: str, source: str) -> None:
    """Arguments as above.

    Args:
        similarity: whether the file must hold MaskCLIP++'s similarity.

    Raises:
        ValueError: a mask generator, with or without the CLIP that it was trained on.
    """
    names = set(names)
    if not _has(names, "proposals.") or (_has_clip(names) and (_has(names, "similarity.") or not similarity)):
        return
    lacks = "the similarity of masks and texts" if _has_clip(names) else "CLIP"
    raise ValueError(
        f"{key}: {source} holds a mask generator{_of(layout)} and lacks {lacks}, so that it is not MaskCLIPpp's; it "
        f"belongs in {_GENERATOR_KEY}"
    )


def _has(names: set[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _has_clip(names: set[str]) -> bool:
    """In ours, or in open_clip's names."""
    return _has(names, "clip.", "visual.")


def _of(layout: str) -> str:
    """The public layout in brackets; nothing for names that were ours already."""
    name, colon, _ = layout.partition(":")
    return f" ({name})" if colon else ""
