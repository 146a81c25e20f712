"""The trainer: a face embedding from pictures to verification, with the fused head on top.

`fused-losses train` on the command line, `train(TrainConfig(...), folder)` from Python.
"""

from fused_losses.train.config import TrainConfig
from fused_losses.train.loop import Interrupted
from fused_losses.train.run import train
from fused_losses.train.verification import FoldEmbeddings, evaluate

__all__ = ["FoldEmbeddings", "Interrupted", "TrainConfig", "evaluate", "train"]
