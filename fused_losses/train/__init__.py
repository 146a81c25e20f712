"""The trainer: a face embedding from pictures to verification, with the fused head on top.

`fused-losses train` on the command line, `train(TrainConfig(...), folder)` from Python.
"""

from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.evaluation import FoldEmbeddings, evaluate
from fused_losses.train.faces.run import train
from fused_losses.train.frame.steps import Interrupted

__all__ = ["FoldEmbeddings", "Interrupted", "TrainConfig", "evaluate", "train"]
