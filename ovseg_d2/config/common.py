"""Keys that all methods share: CLIP, texts and prompts; losses and inference."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_clip_and_texts(ovseg: CN) -> None:
    """Add what images and class names are encoded by to ``MODEL.OVSEG``."""
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


def add_losses_and_inference(ovseg: CN) -> None:
    """Add the set criterion and ``TEST`` to ``MODEL.OVSEG``."""
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
