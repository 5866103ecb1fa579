"""A tiny CLIP: its architecture, how its weights begin, what it says of pictures and texts, and its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_scene import NUM_THINGS

ZOO = Path(__file__).resolve().parents[2] / "ovseg_d2" / "model_zoo"


def build(name: str) -> tuple[nn.Module, open_clip.SimpleTokenizer]:
    """The architecture ``name`` of the zoo with random weights, and its tokenizer."""
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(ZOO / "ovshapes_bpe.txt.gz"))
    config = json.loads((ZOO / f"{name}.json").read_text())
    config["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    return open_clip.CLIP(**config), tokenizer


def image_size(name: str) -> int:
    """Pixels a side of the pictures that the architecture ``name`` is trained on."""
    return json.loads((ZOO / f"{name}.json").read_text())["vision_cfg"]["image_size"]


def start_well(visual: nn.Module) -> None:
    """Random weights that learn faster than the usual ones."""
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        mimetic_init(visual)
    else:
        whole_residuals(visual)


def mimetic_init(visual: nn.Module) -> None:
    """Start attention near "look at what is alike" and positions as sines (mimetic initialization, arXiv 2305.09828).

    A ViT of this size learns several times faster from few pictures than from the usual random weights.
    """
    for block in visual.transformer.resblocks:
        attention = block.attn
        dim, heads = attention.embed_dim, attention.num_heads
        head_dim = dim // heads
        noise = torch.randn(heads, dim, dim) / math.sqrt(dim)
        u, s, v = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(dim))
        root = s[:, :head_dim].sqrt()
        query = (u[:, :, :head_dim] * root[:, None]).transpose(1, 2).reshape(dim, dim)
        key = v[:, :head_dim] * root[..., None]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(dim, dim) / math.sqrt(dim) - 0.4 * torch.eye(dim))
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([query, key.reshape(dim, dim), s.sqrt()[:, None] * v]))
            attention.out_proj.weight.copy_(u * s.sqrt())
    grid, dim = int(math.isqrt(len(visual.positional_embedding) - 1)), visual.positional_embedding.shape[1]
    frequency = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(grid)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=-1).reshape(-1, dim)
    with torch.no_grad():
        visual.positional_embedding[1:] = 0.3 * table


def whole_residuals(visual: nn.Module) -> None:
    """Let the residual branches of a ResNet count from the start; open_clip begins with their last scale at zero."""
    for name, parameter in visual.named_parameters():
        if name.startswith("layer") and name.endswith("bn3.weight"):
            nn.init.ones_(parameter)


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 255] -> unit embeddings (B, D)."""
    mean, std = (
        images.new_tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return F.normalize(model.encode_image((images / 255 - mean) / std), dim=-1)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """(T, 77) -> unit embeddings (T, D); nothing is computed behind the longest text, which the causal mask hides."""
    ends = tokens.argmax(-1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x), device=x.device), ends] @ model.text_projection, dim=-1)


@torch.no_grad()
def zero_shot(
    model: nn.Module, tokenizer: open_clip.SimpleTokenizer, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """Top-1 (percent) over the 64 thing names with one template; of the colour and of the shape alone too."""
    model.eval()
    texts = tokenizer([f"a photo of a {name}." for name in CLASS_NAMES[:NUM_THINGS]]).to(images.device)
    embeds = torch.cat([encode_image(model, chunk.permute(0, 3, 1, 2).float()) for chunk in images.split(64)])
    guess = (embeds @ encode_text(model, texts).T).argmax(-1)
    return {
        "top1": round(100 * float((guess == labels).float().mean()), 1),
        "color": round(100 * float((guess // 8 == labels // 8).float().mean()), 1),
        "shape": round(100 * float((guess % 8 == labels % 8).float().mean()), 1),
    }


def load_weights(model: nn.Module, path: Path) -> None:
    """What :func:`export` wrote, in single precision."""
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})


def export(model: nn.Module, path: Path, metadata: dict[str, object]) -> None:
    """Half-precision weights (batch-norm counters left out of the conversion) with a line of metadata."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, path, {k: str(v) for k, v in metadata.items()})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
