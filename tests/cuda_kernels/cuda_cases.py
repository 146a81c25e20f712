"""Small ragged calls of every CUDA kernel, forward and backward, against float64.

They run three ways: as the host build (test_cuda_cases.py, also with sanitizers), as PTX in the
emulator (test_cuda_ptx.py), and on sources with planted faults (test_cuda_mutants.py). Each is a
call of a backend's own functions, so that it takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cuda_case import CudaCase, near
from cuda_triton_cases import BF16, FP16, FP32, TRITON_CASES
from torch import Tensor
from triton_oracle import DTYPE_STEP

from fused_losses.primitives.distances.inputs import FLAT, PRODUCTS
from fused_losses.primitives.distances.op import distance_matrix
from fused_losses.primitives.row_rules.inputs import TRIPLETS, RowBlock
from fused_losses.primitives.row_rules.rules import ROW_FOLDS
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.op import quantize_rows, select
from fused_losses.row_update import adamw_rows_, sgd_rows_

# ---- distances ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distances:
    kind: str
    dtype: torch.dtype = FP32
    d: int = 27
    weighted: bool = False
    p: float = 2.0
    n: int = 21
    m: int = 37

    @property
    def name(self) -> str:
        size = f"{self.n}x{self.m}x{self.d}"
        return f"{self.kind}-{str(self.dtype)[6:]}-{size}-{self.p:g}{'-w' * self.weighted}"

    def run(self, dtype: torch.dtype, backend: str) -> tuple[Tensor, list[Tensor]]:
        """The distances and their gradients, of rows rounded to the case's dtype."""
        n, m, d = self.n, self.m, self.d
        g = torch.Generator().manual_seed(3)
        x, y = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
        flat = self.kind in FLAT
        if flat:
            x, y = (x > 0.3).float(), (y > 0.3).float()
        if self.kind in ("jensenshannon", "kl"):
            x, y = x.softmax(1), y.softmax(1)
        y[:5] = x[:5]
        given = [x.to(self.dtype), y.to(self.dtype)]
        if self.weighted:
            given.append(torch.rand((m, d) if self.kind == "scaled" else (d,), generator=g))
        if self.dtype != torch.bool:
            given = [t.double() if dtype == torch.float64 else t for t in given]
        if not flat:
            given = [t.requires_grad_() for t in given]
        out = distance_matrix(*given, kind=self.kind, p=self.p, backend=backend)
        grad = torch.randn(n, m, generator=g).to(out.dtype)
        return out, [] if flat else list(torch.autograd.grad(out, given, grad))

    def check(self) -> None:
        got, found = self.run(self.dtype, "cuda")
        want, exact = self.run(torch.float64, "reference")
        near(got, want, 2**-18, "forward")
        for a, b in zip(found, exact, strict=True):
            near(a, b, max(2**-16, 4 * DTYPE_STEP[a.dtype]), "gradient")


BOOL = torch.bool
DISTANCES = [
    *(Distances(kind) for kind in (*PRODUCTS, "chebyshev", "braycurtis", "jensenshannon", "kl")),
    Distances("cityblock", n=67, m=70, d=7),
    Distances("euclidean", n=67, m=70, d=7),
    *(Distances("minkowski", p=p) for p in (1.5, 3.0, 4.0)),
    *(Distances("canberra", d=40, weighted=w) for w in (False, True)),
    *(Distances("scaled", t, 40, weighted=True) for t in (FP32, BF16)),
    *(Distances(kind, BF16, 40) for kind in ("sqeuclidean", "cityblock")),
    *(Distances(kind, FP16, 40) for kind in ("euclidean", "chebyshev")),
    Distances("hamming"),
    Distances("jaccard", BF16, 40, weighted=True),
    Distances("hamming", FP16, 40, weighted=True),
    *(Distances(kind, BOOL, 75, weighted=w) for kind in FLAT for w in (False, True)),
]

# ---- the k best --------------------------------------------------------------------------------


def topk(
    n: int = 21,
    m: int = 150,
    d: int = 24,
    dtype: torch.dtype = FP32,
    y_dtype: torch.dtype | None = None,
    many: bool = False,
    equal: bool = False,
    codes: bool = False,
    bank: bool = False,
    middle: bool = False,
    **options: object,
) -> Callable[[], None]:
    def check() -> None:
        g = torch.Generator().manual_seed(5)
        x, y = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
        if equal:
            y = y[:7].repeat(m // 7 + 1, 1)[:m]  # more ties than a screen can tell apart
        call = dict(x=x.to(dtype), y=y.to(y_dtype or dtype))
        if codes or bank:
            q = quantize_rows(y)
            if bank:
                call |= dict(y=q.codes, y_scale=q.scale)
            else:
                call |= dict(codes=q.codes, codes_scale=q.scale, codes_error=q.error)
        if many:
            integers = lambda size, high: torch.randint(high, (size,), generator=g).int()
            call |= dict(x_labels=integers(n, 4), y_labels=integers(m, 4))
            call |= dict(x_ids=integers(n, 30), y_ids=integers(m, 30))
            call |= dict(exclude=torch.randint(-1, m, (n, 3), generator=g).int())
        if middle:  # every other row finds its candidates in the middle third of the columns
            call |= dict(x_labels=torch.arange(n).int() % 2)
            call |= dict(y_labels=(torch.arange(m) * 3 // m % 2).int(), match="same")
        inputs = TopkInputs(**call, **options)
        keys, index = select(inputs, "cuda")
        want = select(inputs, "reference")
        assert torch.equal(index, want[1])
        near(keys, want[0], 1e-12, "keys")

    return check


TOPK = {
    "one": topk(k=1),
    "five-bf16": topk(k=5, dtype=BF16, kind="cosine"),
    "five-fp16": topk(k=5, dtype=FP16, d=27, kind="sqeuclidean", largest=False),
    "everything": topk(k=7, many=True, match="same", skip_self=True),
    "different": topk(k=1, many=True, match="different", kind="sqeuclidean", largest=False),
    "ties": topk(k=9, equal=True),
    "ties-bf16": topk(k=9, equal=True, dtype=BF16, d=27),
    "ties-fp16": topk(k=9, equal=True, dtype=FP16, kind="cosine"),
    "codes": topk(k=5, codes=True),
    "bank": topk(k=5, bank=True),
    "bank-ties": topk(k=9, bank=True, equal=True),
    "bank-unaligned": topk(k=5, bank=True, d=27, kind="cosine"),
    "bank-of-doubles": topk(k=5, y_dtype=torch.float64, d=27, kind="sqeuclidean"),
    "doubles-ties": topk(k=9, y_dtype=torch.float64, kind="cosine", equal=True),
    "many": topk(k=140, m=200),
    "rows": topk(n=12, k=100, m=130, d=7, equal=True),
    "stored": topk(n=2, k=180, m=280, d=7, kind="sqeuclidean"),
    "splits": topk(n=2, k=3, m=4200, d=5, equal=True, middle=True),
}

# ---- triplets ----------------------------------------------------------------------------------


def triplets(kind: str, n: int, m: int, positives: float = 0.3, nan: bool = False) -> Callable:
    def check() -> None:
        g = torch.Generator().manual_seed(7)
        score = torch.randn(n, m, generator=g).mul(8).round().div(8)  # with ties
        drawn = torch.rand(n, m, generator=g)
        positive, negative = drawn < positives, drawn > 1 - 0.9 * (1 - positives)
        if nan:
            score[n // 2, positive[n // 2].nonzero()[0]] = torch.nan
        rule = ROW_FOLDS["triplets"]
        params = [0.25, float(TRIPLETS.index(kind)), 0.0]
        block = RowBlock(score, positive, negative, None, params)
        got = rule.on("cuda").forward(block)
        leaf = score.double().requires_grad_()
        want = rule.formula(block._replace(score=leaf))
        some = ~want[:, 0].isnan()
        near(got[:, 0], want[:, 0], 1e-6, "sums")
        near(got[some], want[some], 1e-6, "statistics")
        grad = torch.randn(n, 2, generator=g)
        found = rule.on("cuda").gradient(block, grad)[0]
        (exact,) = torch.autograd.grad((want[:, 0] * grad[:, 0]).sum(), leaf)
        near(found[some], exact[some], 1e-5, "slope")

    return check


TRIPLET_CASES = {
    **{kind: triplets(kind, 5, 150) for kind in TRIPLETS[:3]},
    "unaligned-nan": triplets("all", 5, 77, nan=True),
    "parts": triplets("hard", 2, 1200, positives=0.9),
    "parts-unaligned": triplets("all", 1, 1203, positives=0.9),
}

# ---- updates of rows ---------------------------------------------------------------------------


def update(kind: str, dtype: torch.dtype, d: int, **options: float | Tensor) -> Callable[[], None]:
    def check() -> None:
        g = torch.Generator().manual_seed(9)
        weight, grad = torch.randn(40, d, generator=g), torch.randn(13, d, generator=g)
        states = [torch.rand(40, d, generator=g) for _ in range(2)]
        rows = torch.randperm(40, generator=g)[:13]
        if kind == "sgd":
            step, states = sgd_rows_, states[:1] if options.get("momentum") else []
        else:
            step = adamw_rows_
        results = []
        for backend in ("cuda", "reference"):
            given = [weight.to(dtype, copy=True), *(s.clone() for s in states)]
            more = dict(lr=0.1) | options
            step(given[0], rows, grad.to(dtype), *given[1:], backend=backend, **more)
            results.append(given)
        for got, want in zip(*results, strict=True):
            near(got, want, max(1e-6, 2 * DTYPE_STEP[got.dtype]), kind)

    return check


UPDATES = {
    "sgd": update("sgd", FP32, 24, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd-bf16": update("sgd", BF16, 40, momentum=0.9, dampening=0.2),
    "sgd-unaligned": update("sgd", FP16, 27, maximize=True),
    "adamw": update("adamw", FP32, 24, step=torch.tensor(3.0), lr=torch.tensor(0.01)),
    "adamw-bf16": update("adamw", BF16, 40, step=1, weight_decay=0.1),
    "adamw-unaligned": update("adamw", FP16, 27, step=100, maximize=True),
}

CASES: list[CudaCase] = [
    *TRITON_CASES,
    *(CudaCase(c.name, "distances", c.check) for c in DISTANCES),
    *(CudaCase(f"topk-{name}", "topk", check) for name, check in TOPK.items()),
    *(CudaCase(f"triplets-{name}", "triplets", check) for name, check in TRIPLET_CASES.items()),
    *(CudaCase(name, "row_update", check) for name, check in UPDATES.items()),
]
