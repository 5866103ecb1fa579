"""Keys of the backbones that detectron2 lacks."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_backbones(model: CN) -> None:
    """Add a block for each of them to ``MODEL``."""
    # ---- Swin Transformer; the defaults are Swin-T (arXiv 2103.14030, section 3.3)
    swin = model.SWIN = CN()
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    swin.DROP_PATH_RATE = 0.3
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    swin.USE_CHECKPOINT = False  # recompute activations in the backward pass: less memory, more time

    # ---- backbones that are image towers of CLIP: their NAME, PRETRAINED, TRAINABLE, USE_CHECKPOINT are OVSEG.CLIP's
    # ClipResNetBackbone: the batch norms, "SyncBN" (DenseCLIP, where they train), "BN" or "FrozenBN".
    model.CLIP_RESNET = CN()
    model.CLIP_RESNET.NORM = "SyncBN"
    # ClipViTFPN: the ViT with DenseCLIP's feature pyramid
    fpn = model.CLIP_VIT_FPN = CN()
    fpn.OUT_BLOCKS = [3, 5, 7, 11]  # the blocks, from 0, whose outputs become res2 to res5
    fpn.DROP_PATH_RATE = 0.1
    fpn.NORM = "SyncBN"  # of the one batch norm, in the head of res2
    fpn.IMAGE_SIZE = 0  # of images that the stored position table fits: 512 in DenseCLIP; 0: CLIP's own

    # ---- TimmViTFPN: a ViT of timm with the same pyramid; defaults: MTA-CLIP's ViT-S (arXiv 2407.21654, Table 3)
    vit = model.TIMM_VIT_FPN = CN()
    vit.NAME = "vit_small_patch16_384"
    vit.PRETRAINED = "augreg_in21k_ft_in1k"  # a tag of timm or a file; "" only where MODEL.WEIGHTS holds the backbone
    vit.OUT_BLOCKS = [3, 5, 7, 11]
    vit.DROP_PATH_RATE = 0.1
    vit.NORM = "SyncBN"
    vit.USE_CHECKPOINT = False

    # ---- MixTransformer: SegFormer's backbone (arXiv 2105.15203); needs `pip install 'ovseg_d2[mit]'`
    mit = model.MIT = CN()
    mit.NAME = "nvidia/mit-b4"  # or -b0 to -b5, whose weights are fetched, or a folder with config.json and weights
    mit.DROP_PATH_RATE = 0.1
