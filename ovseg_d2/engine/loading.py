"""Weights into a model that is built."""

from __future__ import annotations

import logging
import urllib.error

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.checkpoint.io import read_state_dict
from ovseg_d2.checkpoint.matching import COUNTER, Match, describe_groups, match_state_dict
from ovseg_d2.modeling.clip.build import load_clip_pretrained
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.state_dict import pretrained_names
from ovseg_d2.modeling.proposals.sam import SAMProposals
from ovseg_d2.modeling.proposals.sam_model import load_sam_pretrained

logger = logging.getLogger(__name__)

#: Where models have learned prompts.
_PROMPTS = ("prompts", "mask_prompts")


def load_parts(model: nn.Module, cfg: CfgNode, *, strict: bool) -> None:
    """Load ``MODEL.OVSEG.CLIP.PRETRAINED`` into ``model.clip`` if there is one, then ``MODEL.WEIGHTS`` over it, then
    ``MODEL.OVSEG.PROPOSALS.WEIGHTS`` (the mask generator alone) and ``MODEL.OVSEG.PROMPTS.WEIGHTS`` (learned prompts
    alone) over both.

    A generator's own CLIP (``PROPOSALS.CLIP_PRETRAINED``) and SAM (``PROPOSALS.SAM.NAME``) are loaded like the model's
    CLIP. What a model makes from other parts, a copy of CLIP that is to be tuned for instance, it fills in itself where
    no file gives it (``fill_missing``).

    Our own names, public layouts (``checkpoint.key_maps``) and files of backbones alone are recognised. What keeps its
    initial value, is not used or does not fit is logged by module. Our own checkpoints hold CLIP, too: where
    ``MODEL.WEIGHTS`` has all of it, the pretrained one is not fetched.

    Args:
        strict: as evaluation needs it: together the files must hold every tensor of the model. Otherwise, to start a
            training, whole modules may be missing, but never CLIP.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it cannot be read, is of another architecture or, with ``strict``, something is in no file.
    """
    sources = (
        ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, ""),
        ("MODEL.OVSEG.PROPOSALS.WEIGHTS", cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS, "proposals"),
        *_prompt_sources(model, cfg.MODEL.OVSEG.PROMPTS.WEIGHTS),
    )
    files = [_read(model, cfg, key, path, scope) for key, path, scope in sources if path]
    given = set().union(*(match.weights for _, match in files))
    ovseg = cfg.MODEL.OVSEG
    given |= _load_clip(
        model, "clip", given, key="MODEL.OVSEG.CLIP.PRETRAINED", name=ovseg.CLIP.NAME, tag=ovseg.CLIP.PRETRAINED
    )
    given |= _load_clip(
        model,
        "proposals.clip",
        given,
        key="MODEL.OVSEG.PROPOSALS.CLIP_PRETRAINED",
        name=ovseg.PROPOSALS.CLIP_NAME,
        tag=ovseg.PROPOSALS.CLIP_PRETRAINED,
    )
    given |= _load_sam(model, given, name=ovseg.PROPOSALS.SAM.NAME)
    for _, match in files:
        match.load(model)
    given |= _fill(model, given)
    for _, match in files:
        if match.scope:
            # A generator without classes can begin a training that learns them.
            match.without(given if strict else given | _class_head(model)).require_whole()
        elif strict:
            match.without(given).require_whole()
        else:
            match.without(given).require_some()
    _require_frozen_prompts(model, given)
    missing = [name for name in model.state_dict() if name not in given and not name.endswith(COUNTER)]
    if strict and not cfg.MODEL.WEIGHTS and missing:
        raise ValueError(
            "MODEL.WEIGHTS is empty, expected a checkpoint: the model would run with random weights in "
            f"{describe_groups(missing)}"
        )
    for log_line, match in files:
        logger.info(f"{log_line}: {match.without(given).summary()}")


def _fill(model: nn.Module, given: set[str]) -> set[str]:
    """Names of what the model has made from other parts, because no file gave it."""
    filled = model.fill_missing(given) if hasattr(model, "fill_missing") else set()
    if filled:
        logger.warning(f"in no file, started as a copy of the pretrained CLIP: {describe_groups(filled)}")
    return filled


def _prompt_sources(model: nn.Module, path: str) -> list[tuple[str, str, str]]:
    """The file of learned prompts for each kind of them that the model has: (key, path, scope).

    Raises:
        ValueError: a file, but no prompts.
    """
    if not path:
        return []
    scopes = [scope for scope in _PROMPTS if scope in dict(model.named_children())]
    if not scopes:
        raise ValueError(
            f"MODEL.OVSEG.PROMPTS.WEIGHTS is {path}, but the {type(model).__name__} has no learned prompts; expected "
            "'', or a PROMPTS.KIND other than 'none', or a CROPS.MASK_PROMPTS above 0"
        )
    return [("MODEL.OVSEG.PROMPTS.WEIGHTS", path, scope) for scope in scopes]


def _require_frozen_prompts(model: nn.Module, given: set[str]) -> None:
    """Raise a one-line ``ValueError`` if prompts that are not trained are in no file either."""
    names = [name for name, p in model.named_parameters() if name.partition(".")[0] in _PROMPTS and not p.requires_grad]
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"{missing[0]} is in no file, so that the model would run with prompts that nobody has trained; expected a "
            "checkpoint of PromptTuning, or of a public model, in MODEL.OVSEG.PROMPTS.WEIGHTS"
        )


def _class_head(model: nn.Module) -> set[str]:
    """Names of the tensors that classify a generator's masks."""
    return {name for name in model.state_dict() if name.startswith("proposals.mask_decoder.class_embed.")}


def _read(model: nn.Module, cfg: CfgNode, key: str, path: str, scope: str) -> tuple[str, Match]:
    """The start of a line for the log, and what of the file is for which tensor of the model."""
    try:
        local_path = PathManager.get_local_path(path)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{key}: cannot fetch {path}: {error}") from error
    state_dict = read_state_dict(local_path, allow_pickle=cfg.CHECKPOINT.ALLOW_PICKLE)
    state_dict, layout = convert_state_dict(state_dict)
    return f"{key} ({layout})", match_state_dict(model, state_dict, source=path, scope=scope)


def _load_clip(model: nn.Module, scope: str, given: set[str], *, key: str, name: str, tag: str) -> set[str]:
    """Load the pretrained weights of the CLIP at ``model.<scope>``, unless the files hold all of it.

    Args:
        given: names in the model of what the files hold.
        key: the config's, for errors.
        name, tag: of the model and its weights, see :func:`load_clip_pretrained`.

    Returns:
        Names of what was loaded. What a method adds beside the towers is not among them.

    Raises:
        ValueError: the config names no weights, or not those of this CLIP.
    """
    clip = dict(model.named_modules()).get(scope)
    if not isinstance(clip, Clip):
        return set()
    names = {f"{scope}.{part}" for part in pretrained_names(clip)}
    missing = sorted(part for part in names - given if not part.endswith(COUNTER))
    if not missing:
        return set()
    if not tag:
        raise ValueError(
            f"{key} is empty and MODEL.WEIGHTS does not hold CLIP, which would have random weights: "
            f"{describe_groups(missing)}; expected a tag of open_clip or a file"
        )
    logger.info(load_clip_pretrained(clip, name, tag))
    return names


def _load_sam(model: nn.Module, given: set[str], *, name: str) -> set[str]:
    """Load the weights of SAM, where it makes the masks and the files do not hold all of it; names of what was loaded.

    Raises:
        ValueError: there are none, or they cannot be fetched.
    """
    generator = getattr(model, "proposals", None)
    if not isinstance(generator, SAMProposals):
        return set()
    names = {f"proposals.sam.{part}" for part in generator.sam.state_dict()}
    if names <= given:
        return set()
    logger.info(load_sam_pretrained(generator.sam, name))
    return names
