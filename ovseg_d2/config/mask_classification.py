"""Keys of the methods that classify masks with CLIP: training-free, with frozen hosts, MAFT, MAFT+, MaskCLIP++."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_mask_classification(ovseg: CN) -> None:
    """Add the blocks of these methods to ``MODEL.OVSEG``."""
    # ---- crops: masks as pictures of their own for a frozen CLIP (modeling/mask_classification/crops.py)
    crops = ovseg.CROPS = CN()
    # mask_crop (ZSSeg, FreeSeg, OVSeg); mask, cropmask (ZegFormer's default) or crop (ZegFormer).
    crops.STYLE = "mask_crop"
    crops.SIZE = 224  # pixels a side: what CLIP was trained at
    crops.CHUNK_SIZE = 32  # crops that are made and encoded at once
    # The rest is for mask_crop. ZSSeg: 0.5, but 0.4 and 0.3 for ADE20K's 150 and 847 classes; OVSeg Swin-B: 0.4.
    crops.THRESHOLD = 0.5
    crops.FILL = "mean"  # outside the mask: CLIP's "mean" colour, or "zero" for black
    crops.EXPAND = 1.0  # boxes grow by this factor
    crops.MATTING = False  # mask probabilities weigh the pixels, instead of 0 and 1
    crops.ALIGN_CORNERS = False  # of the bicubic resizing; True in FreeSeg
    crops.MASK_PROMPTS = 0  # depth of mask prompts, for a ViT: OVSeg 3 (arXiv 2210.04150, section 3.3); 0: none

    # ---- training-free models: proposals of any generator, or pixels, classified by CLIP as it is
    free = ovseg.TRAINING_FREE = CN()
    # crops: as above; masks: ClipImageEncoder.encode_masks (mask pooling, or mask tokens of a ViT); dense: no masks,
    # every position of the feature map against the texts, semantic results only.
    free.CLASSIFY = "masks"
    # dense: the ViT's last block: "value" (MaskCLIP, arXiv 2112.01071), "sclip" (2312.01597), "clearclip" (2407.12442),
    # "proxy" (2408.04883), or "full", CLIP's own.
    free.LAST_BLOCK = "value"
    proxy = free.PROXY = CN()
    proxy.NAME = "vit_base_patch8_224.dino"  # ProxyCLIP's network, a vision transformer of timm
    proxy.PRETRAINED = "timm"  # the weights that timm has under this name, or a file
    proxy.BETA = 1.2  # of the mean similarity of an image's positions; those below do not see each other
    proxy.GAMMA = 3.0  # inverse temperature
    # masks, for a ViT: mask tokens as in "maft" (hard masks) or "maskclippp" (soft ones), from block START_LAYER on
    # (from 0; -1: the third from the end; MAFT's ViT-B/16: 8).
    free.MASK_MODE = "maft"
    free.START_LAYER = -1
    free.OBJECTNESS = True  # crops, masks: the generator's probability of "no object" counts, where it has one

    # ---- ensemble of the generator's class probabilities Ap and CLIP's Ac
    ensemble = ovseg.ENSEMBLE = CN()
    # FC-CLIP (section 3.3):
    ensemble.ALPHA = 0.4  # seen classes: Ap^(1-alpha) Ac^alpha
    ensemble.BETA = 0.8  # unseen classes: Ap^(1-beta) Ac^beta
    # Only the generator judges masks that are empty at the resolution of CLIP's features; True in public ResNet models.
    ensemble.VALID_MASKS_ONLY = False

    # MaskCLIPpp: "none" (Ac alone) or "maskclippp" (equation 4; ALPHA 1 - gamma, BETA 1).
    # FrozenCLIP and MAFT: "none" (Ac alone, MAFT's Table 2 and its public code), "zsseg" (FreeSeg too), "ovseg",
    # "zegformer", "zegformer_all", "zegformer_clip" or "maft" (equation 9), see mask_classification/host_ensemble.py.
    ensemble.NAME = "none"
    # ZSSeg: 0.8 for COCO-Stuff, 0.7 for VOC; FreeSeg on ResNet-101: 0.8; ZegFormer: 2/3 always; OVSeg: 0.7.
    ensemble.LAMBDA = 0.7
    # [dataset, lambda]: other values for single test datasets. ZSSeg: VOC and PC-59 0.4, A-150 0.5, A-847 0.7.
    ensemble.LAMBDA_OF = []
    # Subtracted from the scores of seen classes at the end. ZegFormer: 0.1 on COCO-Stuff; ZegCLIP: 0.1, which LDVC and
    # ZegCLIP here apply in the inductive setting alone.
    ensemble.CALIBRATE = 0.0

    # ---- frozen CLIPs that classify the masks of a trained generator (ZegFormer, ZSSeg, FreeSeg, OVSeg), and MAFT
    host = ovseg.FROZEN_CLIP = CN()
    # Of the texts that CLIP compares masks with; empty: TEXT.TEMPLATES, as the generator's classifier.
    host.REGION_TEMPLATES = []
    host.QUERY_PROMPTS = True  # learned prompts stand in the generator's texts, too; False: VOC in ZSSeg
    # Targets of the generator, one kind an iteration: ["semantic"] (MAFT section 5.1) or FreeSeg's fusion training,
    # ["semantic", "instance", "panoptic"], each with its task prompt if there are any.
    host.TRAIN_TASKS = ["semantic"]

    # ---- MAFT: the CLIP of a host becomes mask-aware (arXiv 2310.00240)
    maft = ovseg.MAFT = CN()
    # L, the first block with mask tokens, from 0; ViT-B/16: Table 4(e). The public code has 8 always.
    maft.START_LAYER = 8
    maft.LOSS = "smooth_l1"  # mask-aware loss: smooth_l1, l1, l2 or kl, Table 4(b)
    maft.MASK_AWARE_WEIGHT = 1.0
    maft.DISTILL_WEIGHT = 0.1  # lambda of the self-distillation loss: 0.1 in the public code, 1 in the paper; 0: off

    # ---- MAFT+ (arXiv 2408.00744): FC-CLIP with a tuned CLIP
    plus = ovseg.MAFT_PLUS = CN()
    plus.CONTENT_TRANSFER = True  # class texts that know the image (section 3.2)
    plus.PANOPTIC = False  # the norm's place in it: the public panoptic models have True
    plus.HEADS = 8
    plus.MASK_AWARE_WEIGHT = 1.0  # of MAFT's loss
    plus.RC_WEIGHT = 0.1  # of the representation compensation (section 3.3); 0: off, and no teacher
    plus.RC_SCALES = [1, 2, 4]

    # ---- MaskCLIP++ (arXiv 2412.11464): CLIP tuned on ground-truth masks
    mcpp = ovseg.MASKCLIPPP = CN()
    # Table 1: "cosine" (CLIP's own), "linear" (ViT, ResNet), "pseudo_text" (ConvNeXt), and what breaks the alignment of
    # masks and texts: "mask_linear", "text_linear", "pseudo_text_alone".
    mcpp.SIMILARITY = "linear"
    mcpp.SIMILARITY_AT_TEST = True  # False: CLIP's own cosines in evaluation (Table 11), or for other CLIPs (Table 7)
    mcpp.WIDTH = 768  # linear: T, of what lies between the two maps
    # CLIP's scale on the cosines that "linear" gets; False in the ConvNeXt models. Mere cosines have it always.
    mcpp.USE_LOGIT_SCALE = True
    pseudo = mcpp.PSEUDO_TEXT = CN()
    pseudo.FROM = "dense"  # what texts attend to: "dense", all positions, or "image", the global embedding (Table 13a)
    pseudo.HEADS = 8
    pseudo.DROPOUT = 0.1
    pseudo.NORMALISE = True  # embeddings of positions are made unit vectors first
    pseudo.DETACH = False  # nothing is learned through them
    pseudo.LEARN_SCALE = False  # a scale of its own, from 1 / 0.07
    pseudo.RESIDUAL = False  # the logits of "linear" are added
    mcpp.LOSS = "ce"  # or "bce" (Table 14)
    mcpp.BALANCED = True  # each class in an image counts alike, however many masks it has (Table 14)
    mcpp.TEMPERATURE = 1.0  # of the loss
    # Table 2, where the embeddings of a training come from: "masks" and "boxes" of the ground truth, "pixels", or
    # "matched", the masks of the generator that fit them best.
    mcpp.PRIOR = "masks"
    # Masks without area on CLIP's grid are left out of the loss; False in the ConvNeXt models.
    mcpp.IGNORE_EMPTY = True
    # ViT: the first block with mask tokens, from 0, or from the end if negative (Table 15).
    mcpp.START_LAYER = -3
    # ViT, ResNet: alpha of equation 2 as a logarithm, one a head and block, and whether it is learned (Table 13b).
    mcpp.LOG_ALPHA = -5.0
    mcpp.LEARN_ALPHA = True
