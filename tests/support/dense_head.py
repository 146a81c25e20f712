"""A head as one writes it down: the whole table, every gradient dense, every row in every step.

Literal float64 formulas and torch.optim.SGD; nothing of the package. What `ClassCenters` does
lazily, in chunks and over ranks has to equal this.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

MARGIN, SCALE = 0.2, 16.0  # a CosFace
PLAIN_SCALE = 2.0  # of <x, w> + b
FORMS = ("cosine", "class margins", "bias")


def class_margins(classes: int) -> Tensor:
    return MARGIN * (1 + torch.arange(classes, dtype=torch.float64) % 3) / 2


DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": dict(lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False),
    "adamw": dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
    "adagrad": dict(
        lr=0.1, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10
    ),
}


class DenseHead:
    """weight [C, D] or [C, K, D] float64, what its optimiser keeps, and the gradient that waits.

    form "bias": [C, D + 1], logits of a linear layer whose bias is the last column.
    """

    def __init__(
        self, weight: Tensor, optimizer: str, options: dict[str, Any], form: str = "cosine"
    ) -> None:
        self.form = form
        self.weight = weight.detach().clone().requires_grad_()
        self.kind = optimizer
        self.options = {**DEFAULTS[optimizer], **options}
        self.steps = 0
        self.states: dict[str, Tensor] = {}
        self.grad = torch.zeros_like(self.weight)
        self.touched = torch.zeros(len(weight), dtype=torch.bool)
        self.backwards = 0  # that wait

    def copy(self) -> DenseHead:
        return copy.deepcopy(self)

    # ---- the loss ----

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        part: Tensor | None = None,
        *,
        smoothing: float = 0.0,
        chance: float = 1.0,
    ) -> Tensor:
        """The mean over the rows that have a label; part: ids of the classes that take part.

        chance: of those that are no row's label, which count 1 / chance times in sums over classes;
        1: no class counts more than once.
        """
        valid = labels >= 0
        if not bool(valid.any()):
            return torch.zeros((), dtype=torch.float64)
        rows, y = x[valid], labels[valid]
        times = torch.ones(len(self.weight), dtype=torch.float64)
        if part is not None:
            times = torch.zeros_like(times).index_fill(0, part, 1 / chance).index_fill(0, y, 1)
        z = self._logits(rows, y)
        log_p = z - torch.logsumexp(z + times.log(), dim=1, keepdim=True)
        loss = -log_p.gather(1, y[:, None])[:, 0]
        if smoothing:
            classes = times.sum() if chance == 1 else len(times)
            # of all classes log Z, of each that takes part its score, so often as it counts
            uniform = (z - log_p)[:, 0] - (times * z).sum(dim=1) / classes
            loss = (1 - smoothing) * loss + smoothing * uniform
        return loss.mean()

    def _logits(self, rows: Tensor, y: Tensor) -> Tensor:
        if self.form == "bias":
            return PLAIN_SCALE * rows @ self.weight[:, :-1].T + self.weight[:, -1]
        cosine = _unit(rows) @ _unit(self.weight).flatten(0, -2).T
        cosine = cosine.view(len(rows), len(self.weight), -1).amax(dim=2)
        own = torch.nn.functional.one_hot(y, len(self.weight)).double()
        margins = class_margins(len(self.weight)) if self.form == "class margins" else MARGIN
        return SCALE * (cosine - margins * own)

    def taking_part(self, labels: Tensor, drawn: Tensor | None) -> Tensor | None:
        return None if drawn is None else torch.cat([drawn, labels[labels >= 0]]).unique()

    # ---- the gradient that waits ----

    def backward(self, loss: Tensor, part: Tensor | None) -> None:
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, self.weight, retain_graph=True)
            self.grad += grad
        self.touched |= (
            True if part is None else torch.zeros_like(self.touched).index_fill(0, part, True)
        )
        self.backwards += 1

    def forget(self) -> None:
        self.grad = torch.zeros_like(self.weight)
        self.touched = torch.zeros(len(self.weight), dtype=torch.bool)
        self.backwards = 0

    def round(self) -> None:
        """To float32 and back."""
        self.weight.data = self.weight.data.float().double()
        self.states = {name: state.float().double() for name, state in self.states.items()}

    def resize(self, drawn: Tensor) -> None:
        """The rows in common, and of further classes these rows, with states of 0."""
        both = min(len(drawn), len(self.weight))

        def cut(table: Tensor, rest: Tensor) -> Tensor:
            return torch.cat([table[:both], rest[both:]])

        self.weight = cut(self.weight.detach(), drawn).requires_grad_()
        zeros = torch.zeros_like(drawn)
        self.states = {name: cut(state, zeros) for name, state in self.states.items()}
        self.forget()

    def step(self, clip: float | None = None, only: Tensor | None = None) -> None:
        """With what waits; nothing where nothing does. only: ids of rows that got their part."""
        if not self.backwards:
            return
        grad = self.grad
        if clip is not None:
            grad = grad * min(1.0, clip / (float(grad.norm()) + 1e-6))
        if only is not None:
            given = torch.zeros_like(self.touched).index_fill(0, only, True)
            self.touched &= given
            grad = torch.where(given.view(-1, *[1] * (grad.dim() - 1)), grad, 0)
        self.steps += 1
        with torch.no_grad():
            getattr(self, f"_{self.kind}")(grad, self.touched, **self.options)
        self.forget()

    # ---- the optimisers ----

    def _sgd(self, grad: Tensor, _: Tensor, **options: Any) -> None:
        if options["nesterov"] and not options["momentum"]:
            options["nesterov"] = False
        optimizer = torch.optim.SGD([self.weight], **options)
        if "momentum_buffer" in self.states:
            optimizer.state[self.weight]["momentum_buffer"] = self.states["momentum_buffer"]
        self.weight.grad = grad.clone()
        optimizer.step()
        self.weight.grad = None
        kept = optimizer.state[self.weight].get("momentum_buffer")
        if kept is not None:
            self.states["momentum_buffer"] = kept

    def _adamw(self, grad: Tensor, touched: Tensor, **o: Any) -> None:
        m = self.states.setdefault("exp_avg", torch.zeros_like(grad))
        v = self.states.setdefault("exp_avg_sq", torch.zeros_like(grad))
        (beta1, beta2), t = o["betas"], self.steps
        self.weight *= 1 - o["lr"] * o["weight_decay"]
        m[touched] = beta1 * m[touched] + (1 - beta1) * grad[touched]
        v[touched] = beta2 * v[touched] + (1 - beta2) * grad[touched] ** 2
        root = (v[touched] / (1 - beta2**t)).sqrt() + o["eps"]
        self.weight[touched] -= o["lr"] * (m[touched] / (1 - beta1**t)) / root

    def _adagrad(self, grad: Tensor, touched: Tensor, **o: Any) -> None:
        s = self.states.setdefault("sum", torch.zeros_like(grad))
        lr = o["lr"] / (1 + (self.steps - 1) * o["lr_decay"])
        self.weight *= 1 - lr * o["weight_decay"]
        s[touched] += grad[touched] ** 2
        root = (s[touched] + o["initial_accumulator_value"]).sqrt() + o["eps"]
        self.weight[touched] -= lr * grad[touched] / root


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
