"""Every key that ovseg_d2 adds to detectron2's configuration, with its default and its meaning."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN


def add_ovseg_config(cfg: CN) -> None:
    """Add the project's keys to ``cfg`` (from ``detectron2.config.get_cfg()``), in place.

    A key that the installed detectron2 already has (its versions differ) keeps its meaning and gets our default.
    """
    _add_model(cfg.MODEL)
    _add_input(cfg)
    _add_solver(cfg.SOLVER)

    # Data sets of your own, registered before a run: mappings with `kind` (panoptic, instance, semantic or zero_shot)
    # and the arguments of `data.datasets.register_*`; relative paths start at DETECTRON2_DATASETS.
    cfg.DATASETS.REGISTER = []
    # [dataset, file]: synonyms of its classes, a line a class. Public numbers of FC-CLIP, MAFT+ and MaskCLIP++ are made
    # with such lists (their *_with_prompt_eng.txt, which can be used as they are).
    cfg.DATASETS.CLASS_TEXTS = []

    checkpoint = cfg.CHECKPOINT = CN()
    # Unpickling can run code, so detectron2's .pkl files are read only when this is True.
    checkpoint.ALLOW_PICKLE = False
    checkpoint.KEEP = 0  # how many of the newest periodic checkpoints stay on disk; 0: all


def _add_model(model: Any) -> None:
    ovseg = model.OVSEG = CN()
    # Images are padded so that height and width are multiples of this.
    ovseg.SIZE_DIVISIBILITY = 32

    # ---- CLIP: any architecture and tag of open_clip, or the tiny ones of the package (OVShapes-RN, OVShapes-ViT)
    clip = ovseg.CLIP = CN()
    clip.NAME = "convnext_large_d_320"  # a name of open_clip, or the path of a JSON configuration
    # A tag of open_clip, "ovshapes" for the tiny ones, or a file (safetensors, .pt, OpenAI's TorchScript); "" only
    # where MODEL.WEIGHTS holds CLIP, too.
    clip.PRETRAINED = "laion2b_s29b_b131k_ft_soup"
    # How CLIP's own copy of the image is resized: "none", "short" (shorter side to INPUT_SIZE), "square", or
    # "padded_square" (MAFT: the padded batch is squeezed into a square).
    clip.RESIZE = "none"
    clip.INPUT_SIZE = 0
    clip.TRAINABLE = "frozen"  # a policy of modeling/clip/trainable.py
    clip.USE_CHECKPOINT = False  # recompute activations in the backward pass: less memory, more time

    # ---- text: what a class name is turned into
    text = ovseg.TEXT = CN()
    text.TEMPLATES = ["vild"]  # sets of data/templates.py, or sentences with one "{}"
    # A policy of modeling/clip/trainable.py for the text tower, of MaskCLIPpp (its EVA L/14 on COCO-Stuff), FGASeg and
    # CATSeg alone.
    text.TRAINABLE = "frozen"
    text.CACHE_DIR = ""  # folder for encoded vocabularies of a frozen text encoder; "": in memory only

    # ---- learned prompts: trained by the meta-architecture PromptTuning, used by FrozenCLIP
    prompts = ovseg.PROMPTS = CN()
    # The sentence around a name: "none", "zsseg" (arXiv 2112.14757) or "freeseg" (2303.17225), which has one a task.
    # The templates of texts with prompts must be ["name"]. Mask prompts (OVSeg) are CROPS.MASK_PROMPTS.
    prompts.KIND = "none"
    prompts.PREFIX = 16  # vectors before the name
    prompts.SUFFIX = 0  # vectors behind the name
    # freeseg: vectors in front of the sentence, the same for all tasks, and the names of the tasks in this order; a
    # single name stands for all of them.
    prompts.TASK = 8
    prompts.TASKS = ["semantic segmentation.", "instance segmentation.", "panoptic segmentation."]
    # A checkpoint of PromptTuning or of the public models; of it nothing but the prompts (mask prompts, too) is taken.
    prompts.WEIGHTS = ""
    # PromptTuning: at most so many ground-truth masks an image, drawn at random in each iteration. The public code
    # draws as many of every class instead; DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler goes some of the way.
    prompts.MASKS_PER_IMAGE = 8
    # PromptTuning: share of a mask's box that a training crop shows, as in torchvision's RandomResizedCrop.
    prompts.CROP_AREA = [0.08, 1.0]

    # ---- mask proposals: which generator, and the sizes of the Mask2Former one (Mask2Former paper, section 3)
    prop = ovseg.PROPOSALS = CN()
    prop.NAME = "Mask2FormerProposals"  # a name in MASK_PROPOSAL_REGISTRY
    # Checkpoint of the generator alone, loaded after MODEL.WEIGHTS; model_zoo://FILE for one of the package.
    prop.WEIGHTS = ""
    prop.TRAINABLE = "full"  # or class_head: the classifier of masks alone; or frozen
    # FCCLIPProposals: a CLIP of the generator's own, where it is not MODEL.OVSEG.CLIP's; as NAME and PRETRAINED there,
    # which need not be if the generator's WEIGHTS hold it (FC-CLIP, MAFT+). Its images are normalised as all are, by
    # MODEL.PIXEL_MEAN and PIXEL_STD. With CLASS_HEAD "text" its classes are the texts of that CLIP in these TEMPLATES.
    prop.CLIP_NAME = ""
    prop.CLIP_PRETRAINED = ""
    prop.TEMPLATES = ["vild"]
    # MaskCLIPpp: the dataset whose classes the generator was trained on ("": DATASETS.TRAIN), and its own size of the
    # images, as RESIZE ("none" or "short") and INPUT_SIZE of CLIP.
    prop.DATASET = ""
    prop.RESIZE = "none"
    prop.INPUT_SIZE = 0
    # Masks from files (PrecomputedProposals): the folder that tools/export_proposals.py wrote, one file a dataset.
    prop.FILES = ""
    # PrecomputedProposals, SAMProposals: what no mask covers is one more mask
    prop.RESIDUAL_MASK = True
    # What classifies the queries: "linear" for the classes of the training; "text" (FC-CLIP) and "embed" (ZegFormer,
    # ZSSeg, FreeSeg) for any, by CLIP's texts; "none" where something else does.
    prop.CLASS_HEAD = "linear"
    # "embed": layers and width of the MLP from queries to CLIP's space; ZegFormer: 1, a linear layer.
    prop.EMBED_LAYERS = 2
    prop.EMBED_HIDDEN_DIM = 1024
    prop.TEMPERATURE = 0.01  # "embed": of the cosines; not CLIP's own scale
    prop.LEARN_TEMPERATURE = False  # "embed": True in ZegFormer, which starts from TEMPERATURE
    prop.VOID_NORMALISED = True  # "embed": of the row of "no object"; False in ZegFormer, where its length counts
    # Of the bilinear resizing of mask logits to the image; True in FreeSeg and MAFT.
    prop.ALIGN_CORNERS = False
    prop.NUM_QUERIES = 100
    prop.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    prop.NUM_HEADS = 8
    # Pixel decoder: deformable encoder over ENC_FEATURES, then FPN up to COMMON_STRIDE.
    prop.ENC_FEATURES = ["res3", "res4", "res5"]
    prop.ENC_LAYERS = 6
    prop.ENC_FFN_DIM = 1024
    prop.ENC_DROPOUT = 0.0
    prop.COMMON_STRIDE = 4
    prop.NORM = "GN"
    prop.PIXEL_DIM = 256  # width of the pixel decoder
    prop.MASK_DIM = 256  # width of the per-pixel mask embedding
    # Masked-attention decoder.
    prop.HIDDEN_DIM = 256
    prop.DEC_LAYERS = 9  # real layers: the public Mask2Former configs count the prediction before the first one too
    prop.DEC_FFN_DIM = 2048
    prop.DEC_DROPOUT = 0.0  # MaskFormerProposals, whose public models have 0.1
    prop.PRE_NORM = False
    prop.ENFORCE_INPUT_PROJ = False
    # FreeSegProposals: width and heads of the attention of pixel features to the texts.
    prop.INTERACTION_DIM = 2048
    prop.INTERACTION_HEADS = 8

    # ---- SAMProposals (MAFT, Table 5): masks at a grid of points, of which the good ones are chosen as in SAM's paper
    # (arXiv 2304.02643, appendix B); needs `pip install 'ovseg_d2[sam]'`
    sam = prop.SAM = CN()
    # facebook/sam-vit-{base,large,huge}, whose weights are fetched, or a folder with config.json and weights in the
    # layout of transformers. MAFT has SAM-H, "huge".
    sam.NAME = "facebook/sam-vit-huge"
    sam.POINTS_PER_SIDE = 32  # of the grid over the image, and over each crop
    sam.POINTS_PER_BATCH = 64  # points that the mask decoder takes at once: memory
    sam.PRED_IOU_THRESHOLD = 0.88  # masks that SAM itself expects to be no better are dropped
    # So are masks that change when they are cut at logits of plus or minus STABILITY_OFFSET: the IoU of the two.
    sam.STABILITY_THRESHOLD = 0.95
    sam.STABILITY_OFFSET = 1.0
    sam.NMS_THRESHOLD = 0.7  # box IoU above which the mask with the lower expected IoU is dropped
    sam.CROP_LAYERS = 0  # layer i looks for masks in 4^i overlapping crops, too
    sam.MIN_AREA = 0  # smaller masks are dropped: pixels of the image as the model gets it

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
    ensemble.LAMBDA = 0.7  # ZSSeg and FreeSeg: 0.8 for COCO-Stuff, 0.7 for VOC; ZegFormer: 2/3 always; OVSeg: 0.7
    # [dataset, lambda]: other values for single test datasets. ZSSeg: VOC and PC-59 0.4, A-150 0.5, A-847 0.7.
    ensemble.LAMBDA_OF = []
    ensemble.CALIBRATE = 0.0  # subtracted from the scores of seen classes at the end (ZegFormer: 0.1 on COCO-Stuff)

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
    maft.START_LAYER = (
        8  # L, the first block with mask tokens, from 0; ViT-B/16: Table 4(e). The public code has 8 always
    )
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

    # ---- MTA-CLIP (arXiv 2407.21654): texts beside the queries of Mask2Former. Its fixed-text "matching" (Figure 2) is
    # TEXT_ENHANCED False with PROPOSALS.CLASS_HEAD "embed".
    mta = ovseg.MTA_CLIP = CN()
    # Table 3: the decoder takes texts as queries, too; False: Mask2Former, and nothing of what follows is built.
    mta.TEXT_ENHANCED = True
    # Table 3, MTCL: lambda_3 of the mask-to-text contrastive loss (equations 7 to 10); 0: off, and no projections.
    mta.LOSS_WEIGHT = 1.0
    mta.NUM_CONTEXTS = 3  # Table 4, "# prompts": K; Table 3: 1 without MTPL
    # Learned contexts stand before the names; False: fixed texts of TEXT.TEMPLATES, their mean, kept out of the graph.
    mta.LEARN_CONTEXTS = True
    mta.CONTEXT_LENGTH = 8  # vectors a context
    mta.CONTEXT_INIT_STD = 0.02  # CoOp's, which the paper does not name; DenseCLIP: 1
    # Tokens of a text with its context, SOT and EOT; a longer one is an error. The public DenseCLIP has 13, too.
    mta.TEXT_LENGTH = 13
    mta.NEGATIVES = "mix"  # or "separate": Table 4, MixNeg (equation 8) and SeparateNeg (equation 9)
    # What the loss is divided by: all "queries" (equation 7), or those that are "matched", some ten times fewer.
    mta.SIM_NORM = "queries"
    mta.TEMPERATURE = 0.07  # tau of equation 6, of cosines; the paper has no number, DenseCLIP this one
    mta.LEARN_TEMPERATURE = False  # True: learned, from TEMPERATURE on
    mta.SEPARATE_ATTENTION = False  # Table 4, left: texts and masks attend to themselves, not to each other
    mta.PER_LAYER_PROJ = False  # equation 5 with projections of each layer's own, instead of shared ones
    mta.TEXT_INPUT_NORM = False  # a layer norm before equation 1, as in DenseCLIP
    # What classifies masks: the "head" of the training's classes, or, beyond the paper and for any vocabulary, the
    # "similarity" of mask and text rows, with the head's "no object".
    mta.SCORE = "head"

    # ---- DenseCLIP (arXiv 2112.01518), the pixel-text baseline of MTA-CLIP's Tables 1 to 3
    dense = ovseg.DENSE_CLIP = CN()
    dense.TEXT = True  # False: CLIP + Semantic FPN, Tables 1 and 2 there
    dense.DIM = 256  # width of the feature pyramid and of Semantic FPN
    dense.NORM = "SyncBN"  # of Semantic FPN
    dense.DROPOUT = 0.1  # of channels before the classifier
    dense.CONTEXT_LENGTH = 8  # learned vectors before a name
    dense.CONTEXT_INIT_STD = 1.0
    dense.TEXT_LENGTH = 13  # tokens of a text with its context, SOT and EOT; a longer one is an error
    dense.DECODER_DIM = 256  # the context decoder: width, heads and layers
    dense.DECODER_HEADS = 4
    dense.DECODER_LAYERS = 3
    dense.TEMPERATURE = 0.07  # of the scores of pixels and texts in their loss
    dense.SCORE_WEIGHT = 0.4  # of that loss

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
    fga.ALIGN_LOSS = "bce"  # of the public code; "mse": equation 8
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

    # ---- set criterion; CLASS, MASK and DICE weigh both the losses and the matching costs
    loss = ovseg.LOSS = CN()
    loss.CLASS = 2.0
    loss.MASK = 5.0
    loss.DICE = 5.0
    loss.NO_OBJECT = 0.1  # class weight of "no object"
    # Masks are compared on sampled "points" (Mask2Former), or as a whole by "focal" loss (MaskFormer; ZegFormer and
    # ZSSeg with CLASS 1, MASK 20, DICE 1, FreeSeg with DICE 5). Dice in both.
    loss.MASK_LOSS = "points"
    loss.NUM_POINTS = 12544
    loss.OVERSAMPLE = 3.0
    loss.IMPORTANCE = 0.75
    loss.DEEP_SUPERVISION = True

    # ---- inference
    test = ovseg.TEST = CN()
    # Any of semantic, panoptic, instance: what is computed and evaluated. MaskCLIPpp on GroundTruthProposals also has
    # mask_accuracy, how often a perfect mask gets its class (evaluation/mask_accuracy.py).
    test.TASKS = ["semantic"]
    # How masks become panoptic and instance results: "mask2former", or "freeseg", where both thresholds are 0.5, and
    # the first one is for things only.
    test.MERGE = "mask2former"
    test.OBJECT_MASK_THRESHOLD = 0.8
    test.OVERLAP_THRESHOLD = 0.8
    # "iou": score the upper bound of the masks, too: semantic results where the IoU of masks with true classes stands
    # in for class scores (MAFT, Table 7; evaluation/oracle.py); "": no.
    test.ORACLE = ""
    # Resize mask logits to the output size before instead of after semantic inference. Always so for panoptic
    # and instance results; the public semantic-only configs resize the class scores afterwards.
    test.POSTPROCESS_BEFORE_INFERENCE = False
    # Methods that classify pixels: panoptic and instance results from the masks of PROPOSALS, each of which gets the
    # mean scores of its pixels. Without it they know no objects.
    test.MASK_VOTING = False
    # Methods that classify pixels: windows of SIZE x SIZE pixels at a STRIDE, whose logits are averaged (DenseCLIP's
    # ResNets: 512, 341; its ViT: 640, 426), BATCH of them at once. SIZE 0: the whole image.
    sliding = test.SLIDING = CN()
    sliding.SIZE = 0
    sliding.STRIDE = 341
    sliding.BATCH = 4
    # FGASeg and CATSeg: 640, every image is warped to such a square first; 0: as it was loaded.
    sliding.IMAGE_SIZE = 0
    # Their scores are the mean of those of the windows and of the whole image, warped to a window.
    sliding.WHOLE_IMAGE = False
    # Tight boxes around instance masks. The public Mask2Former returns boxes of zeros (its box AP is 0).
    test.BOXES_FROM_MASKS = True

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


def _add_input(cfg: CN) -> None:
    # Ground truth that the mapper gives: panoptic (a mask a segment), semantic (a mask a class) or instance.
    cfg.INPUT.TARGETS = "panoptic"
    # lsj: large-scale jitter and a square crop of IMAGE_SIZE; crop: shortest-edge choice, CROP and PAD_SIZE;
    # resize: shortest edge only.
    cfg.INPUT.PIPELINE = "lsj"
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.PAD_SIZE = -1  # the crop pipeline pads to exactly this square; -1: no padding
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Segments that the crop removed wholly stay panoptic or instance targets, with an empty mask: so it is in all
    # public Mask2Former mappers but that of COCO instances.
    cfg.INPUT.KEEP_EMPTY_MASKS = True

    # Share of the training images, in (0, 1], drawn at random by SEED; a smaller one is part of a larger one
    # (MaskCLIP++, Table 9).
    cfg.DATALOADER.TRAIN_FRACTION = 1.0

    # An image that cannot be decoded: "skip" (logged with its path, another image takes its place, counted) or "raise".
    cfg.DATALOADER.ON_CORRUPT_IMAGE = "skip"
    cfg.TEST.ON_CORRUPT_IMAGE = "raise"
    # detectron2's TEST.AUG: with ENABLED, --eval-only adds semantic results of several sizes and mirrored, sem_seg_TTA.


def _add_solver(solver: Any) -> None:
    solver.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    # [module path, factor]: learning rate factors; the longest matching path wins.
    solver.LR_FACTORS = [["proposals.backbone", 0.1]]
    solver.WEIGHT_DECAY_NORM = 0.0
    solver.WEIGHT_DECAY_EMBED = 0.0
    # WarmupCosineLR: where the learning rate BASE_LR ends; other groups end lower by their factors.
    solver.BASE_LR_END = 0.0
    solver.POLY_LR_POWER = 0.9
    solver.POLY_LR_CONSTANT_ENDING = 0.0
    solver.AMP.DTYPE = "bfloat16"  # bfloat16 or float16; CPU has bfloat16 only
    solver.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # one L2 norm over all gradients; also detectron2's value and norm
