"""`python -m fused_losses.bench.heads`"""

from fused_losses.bench.heads.page import main

main()
