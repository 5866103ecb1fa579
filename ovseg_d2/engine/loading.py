"""Weights into a model that is built."""

from __future__ import annotations

import logging
import urllib.error

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.checkpoint.io import read_state_dict
from ovseg_d2.checkpoint.matching import match_state_dict

logger = logging.getLogger(__name__)


def load_parts(model: nn.Module, cfg: CfgNode, *, strict: bool) -> None:
    """Load ``MODEL.WEIGHTS``, then ``MODEL.OVSEG.PROPOSALS.WEIGHTS`` (the mask generator alone) over it.

    Our own names, public layouts (``checkpoint.key_maps``) and files of backbones alone are recognised. What keeps its
    initial value, is not used or does not fit is logged by module.

    Args:
        strict: as evaluation needs it: the files must hold every tensor of the model. Otherwise, to start a training,
            whole modules may be missing.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it cannot be read, is of another architecture or, with ``strict``, is not whole.
    """
    proposals = cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS
    if strict and not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty, expected a checkpoint: the model would run with random weights")
    if cfg.MODEL.WEIGHTS:
        # The generator's own file may bring what is missing here.
        _load(model, cfg, "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, scope="", whole=strict and not proposals)
    if proposals:
        _load(model, cfg, "MODEL.OVSEG.PROPOSALS.WEIGHTS", proposals, scope="proposals", whole=True)


def _load(model: nn.Module, cfg: CfgNode, key: str, path: str, *, scope: str, whole: bool) -> None:
    try:
        local_path = PathManager.get_local_path(path)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{key}: cannot fetch {path}: {error}") from error
    state_dict = read_state_dict(local_path, allow_pickle=cfg.CHECKPOINT.ALLOW_PICKLE)
    state_dict, layout = convert_state_dict(state_dict)
    match = match_state_dict(model, state_dict, source=path, scope=scope)
    if whole:
        match.require_whole()
    else:
        match.require_some()
    match.load(model)
    logger.info(f"{key} ({layout}): {match.summary()}")
