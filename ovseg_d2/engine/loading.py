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

logger = logging.getLogger(__name__)


def load_parts(model: nn.Module, cfg: CfgNode, *, strict: bool) -> None:
    """Load ``MODEL.OVSEG.CLIP.PRETRAINED`` into ``model.clip`` if there is one, then ``MODEL.WEIGHTS`` over it, then
    ``MODEL.OVSEG.PROPOSALS.WEIGHTS`` (the mask generator alone) over both.

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
    )
    files = [_read(model, cfg, key, path, scope) for key, path, scope in sources if path]
    given = set().union(*(match.weights for _, match in files))
    given |= _load_clip(model, cfg, given)
    for _, match in files:
        if match.scope:
            # A generator without classes can begin a training that learns them.
            match.without(given if strict else given | _class_head(model)).require_whole()
        elif strict:
            match.without(given).require_whole()
        else:
            match.without(given).require_some()
    missing = [name for name in model.state_dict() if name not in given and not name.endswith(COUNTER)]
    if strict and not cfg.MODEL.WEIGHTS and missing:
        raise ValueError(
            "MODEL.WEIGHTS is empty, expected a checkpoint: the model would run with random weights in "
            f"{describe_groups(missing)}"
        )
    for log_line, match in files:
        match.load(model)
        logger.info(f"{log_line}: {match.without(given).summary()}")


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


def _load_clip(model: nn.Module, cfg: CfgNode, given: set[str]) -> set[str]:
    """Load the pretrained CLIP unless the files hold all of it.

    Args:
        given: names in the model of what the files hold.

    Returns:
        Names of what was loaded. What a method adds beside the towers is not among them.

    Raises:
        ValueError: the config names no weights, or not those of this CLIP.
    """
    clip = getattr(model, "clip", None)
    if not isinstance(clip, Clip):
        return set()
    names = {f"clip.{name}" for name in pretrained_names(clip)}
    missing = sorted(name for name in names - given if not name.endswith(COUNTER))
    if not missing:
        return set()
    options = cfg.MODEL.OVSEG.CLIP
    if not options.PRETRAINED:
        raise ValueError(
            f"MODEL.OVSEG.CLIP.PRETRAINED is empty and MODEL.WEIGHTS does not hold CLIP, which would have random "
            f"weights: {describe_groups(missing)}; expected a tag of open_clip or a file"
        )
    logger.info(load_clip_pretrained(clip, options.NAME, options.PRETRAINED))
    return names
