"""The bound on memory of the functions over pairs: as test_memory.py, with N x M scores."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import pytest
from conftest import STREAMED, require
from test_memory import COUNTER, MIB, told_by_child

BOUND = 40 * MIB


@dataclass(frozen=True)
class Case:
    """One call; the matrix of its scores would be far above the bound."""

    id: str
    n: int = 6_144
    d: int = 48
    dtype: str = "float32"
    precision: str = "fp32"
    bound: int = BOUND
    cpu_only: bool = False

    @property
    def what(self) -> str:
        return self.id.partition("-")[0]

    @property
    def scores(self) -> int:
        return self.n**2 * 4


CASES = [
    Case("info_nce"),
    Case("info_nce-normalised"),
    Case("info_nce-bf16", dtype="bfloat16"),
    Case("supervised_contrastive"),
    Case("nt_xent"),
    Case("uniformity"),
    Case("sigmoid_contrastive"),
    Case("multi_similarity"),
    Case("soft_nearest_neighbor"),
    Case("similarity_attention"),
    Case("kernel_mean"),
    Case("hsic"),
    Case("maxsim"),
    # the promises at D = 512
    Case("info_nce-8192", n=8_192, d=512, bound=64 * MIB, cpu_only=True),
    Case("info_nce-16384", n=16_384, d=512, bound=96 * MIB, cpu_only=True),
    Case("supervised_contrastive-8192", n=8_192, d=512, bound=64 * MIB, cpu_only=True),
]

CHILD = (
    COUNTER
    + """
from fused_losses import functional as f
from fused_losses.late_interaction import maxsim

def tokens(t):
    return t.view(-1, 16, t.shape[1])

# by name: the function, and its arguments from rows x, y, labels and a learnable scalar
CALLS = {
    "info_nce": (f.info_nce, lambda x, y, l, t: ((x, y), dict(symmetric=True, temperature=t))),
    "info_nce-normalised": (
        f.info_nce,
        lambda x, y, l, t: ((x, y), dict(symmetric=True, temperature=t, normalize=True)),
    ),
    "supervised_contrastive": (f.supervised_contrastive, lambda x, y, l, t: ((x, l), {})),
    "nt_xent": (f.nt_xent, lambda x, y, l, t: ((x,), dict(temperature=t))),
    "uniformity": (f.uniformity, lambda x, y, l, t: ((x,), {})),
    "sigmoid_contrastive": (f.sigmoid_contrastive, lambda x, y, l, t: ((x, y), dict(scale=t))),
    "multi_similarity": (f.multi_similarity, lambda x, y, l, t: ((x, l), {})),
    "soft_nearest_neighbor": (f.soft_nearest_neighbor, lambda x, y, l, t: ((x, l), {})),
    "similarity_attention": (f.similarity_attention, lambda x, y, l, t: ((x, y, y), {})),
    "kernel_mean": (f.kernel_mean, lambda x, y, l, t: ((x, y), dict(bandwidth=t))),
    "hsic": (f.hsic, lambda x, y, l, t: ((x, y), {})),
    "maxsim": (maxsim, lambda x, y, l, t: ((tokens(x), tokens(y)), {})),
}

def run(case, backend):
    torch.manual_seed(0)
    n, dtype = case["n"], getattr(torch, case["dtype"])
    rows = torch.randn(2, n, case["d"])
    x, y = (r.div_(r.norm(dim=1, keepdim=True)).to(dtype).clone() for r in rows)
    x.requires_grad_(), y.requires_grad_()
    del rows
    labels, t = torch.arange(n) // 8, torch.tensor(0.5, requires_grad=True)
    fn, read = CALLS.get(case["id"]) or CALLS[case["what"]]
    args, options = read(x, y, labels, t)
    options = {**options, "backend": backend, "precision": case["precision"]}
    def step():
        fn(*args, **options).sum().backward()
    peak = extra(step) - sum(g.grad.nbytes for g in (x, y) if g.grad is not None)
    return peak, fused_losses.explain(fn, *args, **options).peak_extra_bytes

backend, cases = json.loads(sys.argv[1])
# threads, lazy imports and the buffers that MKL keeps are the process's, not the op's
for case in cases:
    run({**case, "n": 256, "d": 48}, backend)
run({**cases[0], "n": 2_048}, backend)
print(json.dumps({case["id"]: run(case, backend) for case in cases}))
"""
)


@functools.cache
def measured(backend: str) -> dict[str, tuple[int, int]]:
    """By case: bytes beyond inputs and gradients at the peak, and what `explain` had said of it."""
    cases = [c for c in CASES if backend == "cpu" or not c.cpu_only]
    if backend == "reference":
        cases = CASES[:1]
    return told_by_child(CHILD, [backend, [{**asdict(c), "what": c.what} for c in cases]])


def of(name: str, case: Case) -> tuple[int, int]:
    if case.cpu_only and name != "cpu":
        pytest.skip("minutes of pure PyTorch")
    return measured(require(name))[case.id]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", STREAMED)
def test_peak_is_far_below_the_scores(name: str, case: Case) -> None:
    assert case.scores > 3 * case.bound  # or the bound would say nothing
    assert of(name, case)[0] <= case.bound


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", STREAMED)
def test_peak_is_within_what_explain_says(name: str, case: Case) -> None:
    extra, told = of(name, case)
    assert extra <= told
    assert told <= 4 * extra  # a plan that says anything would hold too


def test_the_reference_breaks_the_bound() -> None:
    # the control: a harness that saw no allocations would pass everything above
    case = CASES[0]
    extra, told = measured("reference")[case.id]
    assert extra > case.scores > case.bound
    assert extra <= told
