"""Keys of the methods that classify pixels: FGA-seg and CAT-Seg, LDVC and ZegCLIP."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_pixel_classification(ovseg: CN) -> None:
    """Add the blocks of these methods to ``MODEL.OVSEG``."""
    # ---- FGA-seg (arXiv 2501.00877) and its baseline CAT-Seg (2303.11797), which reads of these keys what FGASeg adds
    # not: the sizes of the cost volume, GUIDANCE_LAYERS, MAX_CLASSES, CLASS_LOSS and the prompts. CAT-Seg is FGASeg
    # with P2T_LAYERS 0, ALIGN_WEIGHT 0, LOCAL_SIMILARITY False and FAST False. Tuning: CLIP.TRAINABLE, TEXT.TRAINABLE
    # "attention_qv" (the paper), "full" or "frozen" (Table VII; Table III, "frozen CLIP").
    fga = ovseg.FGA_SEG = CN()
    fga.GUIDANCE_LAYERS = [3, 7]  # CLIP's blocks, from 0, that guide the decoder; ViT-L/14: 7, 15 (section IV-B)
    # Tables II and III: layers of the P2Tformer, N there; 0: texts do not know the image.
    fga.P2T_LAYERS = 1
    fga.P2T_HEADS = 8
    fga.RESIDUAL_SCALE = 0.1  # Table III: gamma, its first value, or its only one
    fga.LEARN_RESIDUAL_SCALE = True  # Table III: gamma trains, one a channel
    # Tables II and III: lambda_align of the T2P loss; 0: off, and its projection is not built.
    fga.ALIGN_WEIGHT = 0.02
    # "bce" of the public code, a mean, or "mse", equation 8: a sum over pixels, some 1e5 times as large (384 x 384),
    # which therefore needs an ALIGN_WEIGHT of its own.
    fga.ALIGN_LOSS = "bce"
    fga.LOCAL_SIMILARITY = True  # Table II, "local cost": S_l beside the cosine, in the volume and in the decoder
    fga.KERNEL_SIZE = 3  # Table IV(a): K of S_l, odd
    fga.NORMALISE_KERNELS = True  # Table IV(b): a softmax over the taps of each channel
    fga.FUSION = "cat"  # Table V: how local similarity joins, "cat" or "add"
    fga.FAST = False  # Table V: auxiliary heads, which rule classes out in evaluation; the best row is "NoFast+Cat"
    # Table VI, Top-N: a class goes on if it is among so many best ones of any pixel of its image; 0: all go on.
    fga.TOP_K = 16
    # Of the auxiliary heads, before the aggregation and before the decoder's stages: lambda_auxi 0.2 is the paper's one
    # weight, the others are 1 in the public code by the precedence of its operators.
    fga.AUX_WEIGHTS = [0.2, 1.0, 1.0]
    fga.CLASS_LOSS = "bce"  # sigmoids of the public code, CAT-Seg's, too; "ce": equation 12, and a softmax
    fga.HIDDEN_DIM = 128  # channels of the cost volume
    fga.LAYERS = 2  # of spatial and class aggregation
    fga.HEADS = 4
    fga.WINDOW_SIZE = 12  # positions a side, of the Swin blocks
    fga.CLASS_ATTENTION = "linear"  # or "full"
    # Positions a side that class attention averages: in training, and in evaluation, where the public scripts have 1.
    fga.POOLING = 2
    fga.TEST_POOLING = 1
    # Classes that are aggregated, of each image those with the largest cosine anywhere, the others score nothing; 0: no
    # limit.
    fga.MAX_CLASSES = 256
    fga.PAD_CLASSES = 256  # fewer classes are filled up to so many, with copies of a learned one; 0: it is not built
    fga.GUIDANCE_DIM = 128  # channels of the image's and of the texts' guidance
    fga.TEXT_GUIDANCE_DIM = 128
    fga.DECODER_DIMS = [64, 32]  # of the decoder's stages
    fga.DECODER_GUIDANCE_DIMS = [256, 128]  # of the blocks' maps, upsampled by 2 and 4
    fga.DECODER_GUIDANCE_PROJ_DIMS = [32, 16]
    # Table VII, Prompt-16: 16 learned tokens for every block of CLIP's two towers, which are frozen then; 0: none.
    fga.PROMPT_LENGTH = 0

    # ---- LDVC (arXiv 2403.08426) and ZegCLIP (2212.03588), its baseline, whose decoder reads HEADS, FFN_DIM, DROPOUT
    # and ATM_LAYERS. Rows of Tables 4, 5 and 7: the meta-architecture, VISUAL_PROMPTS, TEXT_PROMPTS and TOP_K.
    ldvc = ovseg.LDVC = CN()
    # What training knows of the unseen classes: "inductive", nothing; "transductive", where they are, from a checkpoint
    # of an inductive training on (Table 2); "supervised", everything (Table 3).
    ldvc.SETTING = "inductive"
    # Tables 5 and 7: learned tokens before every block of the image tower. VOC: 40; ZegCLIP 100, VOC 10. 0: none.
    ldvc.VISUAL_PROMPTS = 100
    ldvc.PROMPT_PROJ = True  # ZegCLIP's linear layer that all of them pass through
    ldvc.PROMPT_DROPOUT = 0.1
    ldvc.PROMPT_NORM = True  # ZegCLIP's learned norm before CLIP's last one; only with prompts
    # Tables 5 and 7: learned tokens before a name in every block of the text tower; 0: fixed texts, the mean over
    # TEXT.TEMPLATES, which is read there alone.
    ldvc.TEXT_PROMPTS = 6
    # Table 6: the words whose states they start as; "": random values. Fewer words fill the places next to the name.
    ldvc.TEXT_INIT = "this is a photo of a"
    # Table 9: the blocks of the image tower, from 0, that the decoder's blocks see, one each: [7, 5, 3], [9, 7, 5, 3].
    ldvc.TAPS = [7, 5]
    ldvc.TAP_NORM = False  # a layer norm before the convolution of what they see
    ldvc.TAP_ZERO_INIT = False  # that convolution starts as zero; else its output outweighs CLIP's embeddings at first
    # Table 8: windows that a window attends to; Tables 4 and 7, "w/o LCSA": 0, every position attends to all.
    ldvc.TOP_K = 16
    ldvc.WINDOW_SIZE = 4  # positions a side
    # How that is computed: "gather" or "dense" (with a mask), which give the same; "auto": by the size of the map.
    ldvc.FORM = "auto"
    ldvc.SCALE = "head"  # attention is divided by the root of a head's channels, or (equation 12) of all: "dim"
    ldvc.HEADS = 8
    ldvc.FFN_DIM = 2048
    ldvc.DROPOUT = 0.1
    ldvc.ATM_LAYERS = 3  # ZegCLIP: of its decoder
    ldvc.FOCAL_WEIGHT = 100.0
    ldvc.DICE_WEIGHT = 1.0
    ldvc.AUX_WEIGHT = 0.0  # of the same losses after LDVC's earlier blocks; 0: none
    ldvc.MASK_IGNORED = False  # True: pixels without a class are left out of the losses, where they are of no class
    # ZegCLIP's image tower: the class embedding counts twice, as its weights expect, and the position table is stored
    # for square images of so many pixels; 0: as CLIP has it.
    ldvc.EXTRA_CLASS_EMBEDDING = True
    ldvc.POSITION_SIZE = 512
