"""No CUDA form holds N x M either: allocations counted while the host executes the kernels.

The tiles of the host execution are small, so that batches of a thousand rows are large beside them.
(Over classes: test_memory.py.)
"""

from __future__ import annotations

import functools

import pytest
from conftest import CUDA, require
from counted import COUNTER, told_by_child

pytestmark = [pytest.mark.slow, pytest.mark.processes]

N, D = 1_024, 16
SCORES = 4 * N * N
CALLS = {
    "info_nce": "f.info_nce(x, y, symmetric=True, **o)",
    "multi_similarity": "f.multi_similarity(x, labels, **o)",
    "contrastive": "f.contrastive(x, labels, **o)",
    "similarity_attention": "f.similarity_attention(x, y, y, **o).sum()",
    "maxsim": "maxsim(x.view(-1, 16, x.shape[1]), y.view(-1, 16, y.shape[1]), **o).sum()",
    "mine_triplets": "f.mine_triplets(x, labels, **o)",
    "pairwise_topk": "f.pairwise_topk(x.detach(), y.detach(), 8, 'dot', **o)",
}
CHILD = (
    COUNTER
    + """
from fused_losses import functional as f
from fused_losses.primitives.maxsim.op import maxsim
torch.set_num_threads(1)
calls, sizes = json.loads(sys.argv[1])

def run(call, n, d):
    torch.manual_seed(0)
    rows = torch.randn(2, n, d)
    x, y = (r.div_(r.norm(dim=1, keepdim=True)).clone().requires_grad_() for r in rows)
    names = dict(globals(), x=x, y=y, labels=torch.arange(n) // 4, o={"backend": "cuda"})
    def step():
        loss = eval(call, names)
        if torch.is_tensor(loss):
            loss.backward()
    return extra(step)

# threads, lazy imports and the buffers that MKL keeps, by the products' sizes, are the process's
for call in calls.values():
    run(call, *sizes)
print(json.dumps({name: run(call, *sizes) for name, call in calls.items()}))
"""
)


@functools.cache
def measured() -> dict[str, int]:
    return told_by_child(CHILD, [CALLS, [N, D]])


@pytest.mark.skipif(not CUDA, reason="FUSED_LOSSES_CUDA_ON_HOST is not 1")
@pytest.mark.parametrize("name", CALLS)
def test_the_peak_is_below_the_scores(name: str) -> None:
    require("cuda")
    # eager keeps several such matrices
    assert measured()[name] < SCORES // 2
