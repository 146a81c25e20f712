"""`python -m fused_losses.bench.heads`: writes the page of the model and its plot."""

from fused_losses.bench.heads.model import main

main()
