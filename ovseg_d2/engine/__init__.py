"""From a command line to trained weights and metrics."""

from ovseg_d2.engine.evaluate import evaluate
from ovseg_d2.engine.launch import launch, one_line_errors
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.loading import load_model, load_parts
from ovseg_d2.engine.lr_schedule import build_lr_scheduler
from ovseg_d2.engine.main import main
from ovseg_d2.engine.optimizer import build_optimizer
from ovseg_d2.engine.setup import default_argument_parser, setup
from ovseg_d2.engine.trainer import Trainer

__all__ = [
    "Trainer",
    "build_lr_scheduler",
    "build_optimizer",
    "default_argument_parser",
    "evaluate",
    "launch",
    "load_config",
    "load_model",
    "load_parts",
    "main",
    "one_line_errors",
    "setup",
]
