"""Open-vocabulary image segmentation on Detectron2."""

import warnings

# detectron2 0.5 calls it at import, once a process: a page of warning before every command's own words.
warnings.filterwarnings("ignore", message="`torch.jit.script`", category=FutureWarning)

__version__ = "0.1.0"
