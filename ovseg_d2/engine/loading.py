"""Weights into a model that is built."""

from __future__ import annotations

import logging
import urllib.error
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from ovseg_d2.checkpoint.catalogue import CatalogueError
from ovseg_d2.checkpoint.contents import require_clip, require_generator, require_tuned_clip
from ovseg_d2.checkpoint.convert import clip_part, convert_checkpoint, convert_state_dict, is_own, unknown_format
from ovseg_d2.checkpoint.io import read_state_dict
from ovseg_d2.checkpoint.matching import COUNTER, Match, describe_groups, match_state_dict
from ovseg_d2.modeling.backbones.pretrained import PretrainedBackbone
from ovseg_d2.modeling.clip.build import load_clip_pretrained
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.openai import is_torchscript
from ovseg_d2.modeling.clip.proxy_model import ProxyModel, load_proxy_pretrained
from ovseg_d2.modeling.clip.state_dict import fitted_weights, pretrained_names
from ovseg_d2.modeling.meta_arch.maskclippp import MaskCLIPpp
from ovseg_d2.modeling.proposals.sam import SAMProposals
from ovseg_d2.modeling.proposals.sam_model import load_sam_pretrained

logger = logging.getLogger(__name__)

#: Where models have learned prompts.
_PROMPTS = ("prompts", "mask_prompts")


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of a config with all its weights, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_parts`, of which nothing may be missing.
    """
    model = build_model(cfg).eval()
    load_parts(model, cfg, strict=True)
    return model


def load_parts(model: nn.Module, cfg: CfgNode, *, strict: bool) -> None:
    """Load ``MODEL.OVSEG.CLIP.PRETRAINED`` into ``model.clip`` if there is one, then ``MODEL.WEIGHTS`` over it, then
    ``MODEL.OVSEG.PROPOSALS.WEIGHTS`` (the mask generator alone) and ``MODEL.OVSEG.PROMPTS.WEIGHTS`` (learned prompts
    alone) over both.

    A generator's own CLIP (``PROPOSALS.CLIP_PRETRAINED``), SAM (``PROPOSALS.SAM.NAME``), ProxyCLIP's network
    (``TRAINING_FREE.PROXY.PRETRAINED``) and backbones that name their weights (``PretrainedBackbone``) are loaded like
    the model's CLIP; the CLIP in a generator's file, the backbone of FC-CLIP and MAFT+, becomes the generator's own.
    What a model makes from other parts, a copy of CLIP that is to be tuned for instance, it fills in itself where no
    file gives it (``fill_missing``).

    Our own names, public layouts (``checkpoint.key_maps``) and files of backbones alone are recognised; files of whole
    models in ``CLIP.PRETRAINED``, too, of which CLIP is taken. What keeps its initial value, is not used or does not
    fit is logged by module. Our own checkpoints hold CLIP, too: where ``MODEL.WEIGHTS`` has all of it, the pretrained
    one is not fetched.

    Args:
        strict: as evaluation needs it: together the files must hold every tensor of the model. Otherwise, to start a
            training, whole modules may be missing, but never CLIP.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it cannot be read, is of another architecture, holds a generator where CLIP is expected or the other
            way round, or, with ``strict``, something is in no file.
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
    given |= _load_proxy(model, given, pretrained=ovseg.TRAINING_FREE.PROXY.PRETRAINED)
    given |= _load_backbone(model, given)
    for _, match in files:
        match.load(model)
    given |= _fill(model, given)
    # First the files of single parts: where one does not fit, it is to blame, not the file of the whole model.
    for _, match in sorted(files, key=lambda file: not file[1].scope):
        if match.scope:
            # A generator without classes can begin a training that learns them; without a checkpoint of the whole model
            # it is that which is missing, as is said below.
            whole = strict and cfg.MODEL.WEIGHTS
            match.without(given if whole else given | _class_head(model)).require_whole()
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
        logger.warning(f"in no file, filled in from the pretrained CLIP or the config: {describe_groups(filled)}")
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
    except CatalogueError as error:
        raise ValueError(f"{key}: {error}") from error
    if is_torchscript(Path(local_path)):
        raise ValueError(
            f"{key}: {path} is a TorchScript archive, as OpenAI's CLIPs are; it belongs in MODEL.OVSEG.CLIP.PRETRAINED"
        )
    public = read_state_dict(local_path, allow_pickle=cfg.CHECKPOINT.ALLOW_PICKLE)
    conversion = convert_checkpoint(public)
    state_dict, layout = conversion.weights, str(conversion)
    own = model.state_dict()
    if scope == "proposals":
        require_generator(state_dict, layout, key=key, source=path)
        state_dict = _with_own_clip(model, state_dict)
    elif not scope and isinstance(model, MaskCLIPpp):
        similarity = any(name.startswith("similarity.") for name in own)
        require_tuned_clip(state_dict, layout, similarity=similarity, key=key, source=path)
    state_dict = fitted_weights(state_dict, own)
    ignored = getattr(model, "ignored_weights", ())
    not_used = [name for name in state_dict if name.startswith(ignored) and name not in own]
    if not_used:
        layout = f"{layout}; no use here for {describe_groups(not_used)}"
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in set(not_used)}
    match = match_state_dict(model, state_dict, source=path, scope=scope)
    if not match.weights and conversion.key_map is None and not is_own(public):
        raise ValueError(f"{key}: 0 of {match.total} tensors match the model; {unknown_format(public, path)}")
    return f"{key} ({layout})", match


def _with_own_clip(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a generator's file holds, in our names, with its CLIP where a generator with a CLIP of its own has it.

    Checkpoints in which the generator had one beside the model's have it there already. A text tower that this
    generator has no use for is left out.
    """
    clip = getattr(getattr(model, "proposals", None), "clip", None)
    if not isinstance(clip, Clip) or any(name.startswith("proposals.clip.") for name in state_dict):
        return dict(state_dict)
    parts = ("clip.visual.tower.", "clip.logit_scale", *(() if clip.text is None else ("clip.text.",)))
    return {f"proposals.{name}" if name.startswith(parts) else name: t for name, t in state_dict.items()}


def _clip_of(state_dict: Mapping[str, Tensor], *, key: str, source: str) -> dict[str, Tensor]:
    """The CLIP in a file under ``key``.

    Raises:
        ValueError: there is a mask generator instead.
    """
    converted, layout = convert_state_dict(state_dict)
    require_clip(converted, layout, key=key, source=source)
    return clip_part(state_dict)


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
    logger.info(load_clip_pretrained(clip, name, tag, convert=partial(_clip_of, key=key, source=tag)))
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


def _load_backbone(model: nn.Module, given: set[str]) -> set[str]:
    """Load the weights that a backbone names, unless the files hold all of it; names of what was loaded.

    Raises:
        ValueError: it names none, or they cannot be fetched, or do not fit.
    """
    loaded = set()
    for path, backbone in model.named_modules():
        if not isinstance(backbone, PretrainedBackbone):
            continue
        names = {f"{path}.{part}" for part in backbone.pretrained_names()}
        missing = sorted(part for part in names - given if not part.endswith(COUNTER))
        if not missing:
            continue
        if not backbone.weights_name:
            raise ValueError(
                f"{backbone.weights_key} is empty and MODEL.WEIGHTS does not hold the backbone, which would have "
                f"random weights: {describe_groups(missing)}; expected the name of weights or a file"
            )
        logger.info(backbone.load_pretrained())
        loaded |= names
    return loaded


def _load_proxy(model: nn.Module, given: set[str], *, pretrained: str) -> set[str]:
    """Load the weights of ProxyCLIP's network, where there is one and the files do not hold all of it.

    Returns:
        Names of what was loaded.

    Raises:
        ValueError: there are none, or they cannot be fetched.
    """
    proxy = getattr(model, "proxy", None)
    if not isinstance(proxy, ProxyModel):
        return set()
    names = {f"proxy.{part}" for part in proxy.state_dict()}
    if names <= given:
        return set()
    logger.info(load_proxy_pretrained(proxy, pretrained))
    return names
