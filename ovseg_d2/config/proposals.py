"""Keys of the mask generators."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_proposals(ovseg: CN) -> None:
    """Add ``PROPOSALS`` to ``MODEL.OVSEG``."""
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
