"""Keys of the methods that are made for one vocabulary: MTA-CLIP and DenseCLIP."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_closed_vocabulary(ovseg: CN) -> None:
    """Add the blocks of these methods to ``MODEL.OVSEG``."""
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
