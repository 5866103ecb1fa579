"""Which weights of a CLIP tower train: policies with names, that pick modules, never parts of names.

``MODEL.OVSEG.CLIP.TRAINABLE``, and ``MODEL.OVSEG.TEXT.TRAINABLE`` for a text tower, is one of

* ``frozen``: nothing;
* ``full``: everything;
* ``trunk``: all but what turns features into embeddings (MAFT+; MaskCLIP++'s ``before_proj``);
* ``attention``: attention and the norms of all blocks, and the last norm (MAFT's code; its paper trains the projection
  and freezes the last norm); of a ResNet, the projections of its attention pool;
* ``all_but_`` and units: everything else (MAFT, Table 4(d)): ``cls`` the class embedding, ``pos`` the position table,
  ``mlp`` the feed-forward networks, ``conv`` the patch embedding or a ResNet's convolutions, ``proj`` the last
  projection. ``all_but_cls_pos_mlp_conv`` is the paper's choice. A unit that a tower lacks changes nothing;
* ``all_but_bn``: of a ResNet, everything but its batch norms, whose moving statistics stay, too (MaskCLIP++);
* ``before_s4``, ``after_s4``: of a ConvNeXt, what comes before its fourth stage, or the fourth stage and all behind it
  (MaskCLIP++);
* ``attention_in``: the attention's input projections and the position table (MaskCLIP++; of unfused projections, those
  of queries and values, as its code has it);
* ``attention_mlp``: of a text tower, ``attention_in`` and the feed-forward networks and norms of all blocks.
  MaskCLIP++'s paper means ``attention_in``; its code trains these, too, and so were its published L/14 weights made;
* ``attention_qv``: the weights of queries and values alone (CAT-Seg, FGA-seg);
* ``projection``: the last projection alone (MaskCLIP++'s ``proj``).

Policies speak of the tower. What an encoder has beside it (scales of masks, prompts) is new and trains in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder

Selection = Iterator[nn.Parameter]
#: Of MAFT's Table 4(d), in its order.
UNITS = ("cls", "pos", "mlp", "conv", "proj")
_KEY, _TEXT_KEY = "MODEL.OVSEG.CLIP.TRAINABLE", "MODEL.OVSEG.TEXT.TRAINABLE"
_ALL_BUT = "all_but_"
_PACKED_NAME = "in_proj_weight"
_SPLIT_NAMES = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def apply_policy(encoder: nn.Module, policy: str) -> None:
    """Set ``requires_grad`` of a tower's parameters.

    Args:
        encoder: a :class:`ClipImageEncoder`, whose tower is meant, or a :class:`ClipTextEncoder`.
        policy: a name of the list above. ``attention_qv`` splits packed projections, see :func:`split_qkv`.

    Raises:
        ValueError: a policy or a unit that does not exist, or not for this tower.
    """
    tower = getattr(encoder, "tower", encoder)
    key = _TEXT_KEY if isinstance(tower, ClipTextEncoder) else _KEY
    policies, units = policies_of(tower), units_of(tower)
    if policy in policies:
        trainable = {id(parameter) for parameter in policies[policy]()}
    elif policy.startswith(_ALL_BUT) and units is not None:
        names = policy.removeprefix(_ALL_BUT).split("_")
        unknown = [name for name in names if name not in UNITS]
        if unknown:
            raise ValueError(
                f"{key}: {policy!r} has a unit {unknown[0]!r}; expected one or more of {', '.join(UNITS)}, joined by _"
            )
        frozen = {id(parameter) for name in names for parameter in units.get(name, ())}
        trainable = {id(parameter) for parameter in tower.parameters()} - frozen
    else:
        more = () if units is None else (f"{_ALL_BUT}UNIT_UNIT... of the units {' '.join(UNITS)}",)
        raise ValueError(
            f"{key}: {policy!r} for a {type(encoder).__name__}; expected one of {', '.join((*policies, *more))}"
        )
    for parameter in tower.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    # A tower that has become frozen goes to evaluation mode, one that trains again to its encoder's.
    encoder.train(encoder.training)


def policies_of(tower: nn.Module) -> dict[str, Callable[[], Selection]]:
    """The policies that fit a tower, with what they select.

    Raises:
        ValueError: an unknown tower.
    """
    policies: dict[str, Callable[[], Selection]] = {"frozen": lambda: iter(()), "full": tower.parameters}
    trunk = getattr(tower, "trunk", None)
    if isinstance(tower, VisionTransformer):
        policies |= _vit_policies(tower)
    elif isinstance(tower, ClipTextEncoder):
        policies |= _text_policies(tower)
    elif isinstance(tower, ModifiedResNet):
        pool = tower.attnpool
        policies["trunk"] = lambda: _all_but(tower, pool)
        policies["attention"] = lambda: (
            p for m in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj) for p in m.parameters()
        )
        policies["all_but_bn"] = lambda: _all_but(tower, *(m for m in tower.modules() if isinstance(m, _BatchNorm)))
    elif isinstance(tower, TimmModel) and isinstance(trunk, ConvNeXt):
        behind = (*trunk.stages[3:], trunk.norm_pre, trunk.head, tower.head)
        policies["trunk"] = lambda: _all_but(tower, trunk.head, tower.head)
        policies["before_s4"] = lambda: _all_but(tower, *behind)
        policies["after_s4"] = lambda: (p for module in behind for p in module.parameters())
    elif isinstance(tower, TimmModel) and isinstance(trunk, Eva):
        policies |= _eva_policies(tower)
    else:
        raise ValueError(f"no policies of {_KEY} are known for a tower {type(tower).__name__}")
    return policies


def units_of(tower: nn.Module) -> dict[str, list[nn.Parameter]] | None:
    """The parameters of each of :data:`UNITS` that a tower has; None for a tower that MAFT does not speak of."""
    trunk = getattr(tower, "trunk", None)
    if isinstance(tower, VisionTransformer):
        units: dict[str, Sequence[nn.Module | nn.Parameter]] = {
            "cls": [tower.class_embedding],
            "pos": [tower.positional_embedding],
            "mlp": [block.mlp for block in tower.transformer.resblocks],
            "conv": [tower.conv1],
            "proj": [tower.proj],
        }
    elif isinstance(tower, TimmModel) and isinstance(trunk, Eva):
        units = {
            "cls": [trunk.cls_token],
            "pos": [trunk.pos_embed],
            "mlp": [block.mlp for block in trunk.blocks],
            "conv": [trunk.patch_embed],
            "proj": [trunk.head, tower.head],
        }
    elif isinstance(tower, ModifiedResNet):
        units = {
            "pos": [tower.attnpool.positional_embedding],
            "conv": [module for module in tower.children() if module is not tower.attnpool],
            "proj": [tower.attnpool.c_proj],
        }
    else:
        return None
    return {
        name: [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
        for name, parts in units.items()
    }


def _vit_policies(tower: VisionTransformer) -> dict[str, Callable[[], Selection]]:
    blocks = tower.transformer.resblocks
    return {
        "trunk": lambda: (p for p in _all_but(tower, tower.ln_post) if p is not tower.proj),
        "attention": lambda: chain(
            (p for block in blocks for m in (block.attn, block.ln_1, block.ln_2) for p in m.parameters()),
            tower.ln_post.parameters(),
        ),
        "attention_in": lambda: chain([tower.positional_embedding], _input_weights(blocks)),
        "attention_qv": lambda: _query_value_weights(blocks),
        "projection": lambda: iter([tower.proj]),
    }


def _text_policies(encoder: ClipTextEncoder) -> dict[str, Callable[[], Selection]]:
    blocks = encoder.transformer.resblocks
    projection = encoder.text_projection
    return {
        "attention_in": lambda: chain([encoder.positional_embedding], _input_weights(blocks)),
        "attention_mlp": lambda: chain(
            [encoder.positional_embedding],
            _input_weights(blocks),
            (p for block in blocks for m in (block.mlp, block.ln_1, block.ln_2) for p in m.parameters()),
        ),
        "attention_qv": lambda: _query_value_weights(blocks),
        "projection": lambda: projection.parameters() if isinstance(projection, nn.Module) else iter([projection]),
    }


def _eva_policies(tower: TimmModel) -> dict[str, Callable[[], Selection]]:
    trunk = tower.trunk
    fused = trunk.blocks[0].attn.qkv is not None
    names = ("qkv",) if fused else ("q_proj", "v_proj")
    head = (trunk.head, tower.head)

    def input_weights() -> Selection:
        return (getattr(block.attn, name).weight for block in trunk.blocks for name in names)

    policies: dict[str, Callable[[], Selection]] = {
        "trunk": lambda: _all_but(tower, trunk.norm, trunk.fc_norm, *head),
        "attention": lambda: chain(
            (p for block in trunk.blocks for m in (block.attn, block.norm1, block.norm2) for p in m.parameters()),
            trunk.norm.parameters(),
        ),
        "attention_in": lambda: chain([trunk.pos_embed], input_weights()),
        "projection": lambda: (p for module in head for p in module.parameters()),
    }
    if not fused:
        policies["attention_qv"] = input_weights
    return policies


def _all_but(tower: nn.Module, *modules: nn.Module) -> Selection:
    left_out = {id(p) for module in modules for p in module.parameters()}
    return (p for p in tower.parameters() if id(p) not in left_out)


def _input_weights(blocks: nn.Module) -> Selection:
    for block in blocks:
        attn = block.attn
        if attn.in_proj_weight is not None:
            yield attn.in_proj_weight
        else:
            yield from (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)


def _query_value_weights(blocks: nn.Module) -> Selection:
    for block in blocks:
        split_qkv(block.attn)
        yield from (block.attn.q_proj_weight, block.attn.v_proj_weight)


def split_qkv(attn: nn.MultiheadAttention) -> None:
    """Turn the packed input projection into three weights, in place; the output stays the same.

    So that queries and values can train without keys. The biases stay packed, as in CAT-Seg's and FGA-seg's
    checkpoints. ``load_state_dict`` still takes packed weights; see also :func:`split_packed_weights`.
    """
    if attn.in_proj_weight is None:
        return
    packed = attn.in_proj_weight
    for name, weight in zip(_SPLIT_NAMES, packed.detach().chunk(3), strict=True):
        attn.register_parameter(name, nn.Parameter(weight.clone(), requires_grad=packed.requires_grad))
    attn.register_parameter("in_proj_weight", None)
    # What PyTorch's forward goes by; open_clip's text tower uses it.
    attn._qkv_same_embed_dim = False
    attn.register_load_state_dict_pre_hook(_split_when_loaded)


def split_packed_weights(state_dict: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Split those packed projections of a checkpoint that a model has split.

    Args:
        state_dict: of the checkpoint.
        names: of the model's tensors.
    """
    split = {}
    for name, tensor in state_dict.items():
        prefix = name.removesuffix(_PACKED_NAME)
        parts = [f"{prefix}{part}" for part in _SPLIT_NAMES]
        if name.endswith(_PACKED_NAME) and parts[0] in names:
            split.update(zip(parts, tensor.chunk(3), strict=True))
        else:
            split[name] = tensor
    return split


def pack_split_weights(state_dict: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Pack those split projections of a checkpoint that a model has packed: the reverse of
    :func:`split_packed_weights`, with the same arguments."""
    packed = dict(state_dict)
    for name in state_dict:
        prefix = name.removesuffix(_SPLIT_NAMES[0])
        parts = [f"{prefix}{part}" for part in _SPLIT_NAMES]
        if prefix != name and f"{prefix}{_PACKED_NAME}" in names and all(part in packed for part in parts):
            packed[f"{prefix}{_PACKED_NAME}"] = torch.cat([packed.pop(part) for part in parts])
    return packed


def _split_when_loaded(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    packed = state_dict.pop(f"{prefix}{_PACKED_NAME}", None)
    if packed is not None:
        state_dict.update(zip((f"{prefix}{name}" for name in _SPLIT_NAMES), packed.chunk(3), strict=True))
