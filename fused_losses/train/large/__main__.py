"""`torchrun --max-restarts 10 -m fused_losses.train.large`."""

import atexit
import os
import sys

from fused_losses.train.large.cli import main

status = main()
# What follows an exit, but for the interpreter's end: a thread of torch that drops a tensor after
# it aborts the process, with all work done.
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
