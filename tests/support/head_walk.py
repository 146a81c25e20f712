"""A head and its dense model side by side: what people do with a module between steps, as methods.

Each method does one thing to both; losses and gradients are compared where they arise, the table
and optimiser states in `check`, since reading them makes lazy rows catch up. All ranks walk alike.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense_head import MARGIN, PLAIN_SCALE, SCALE, DenseHead, class_margins
from torch import Tensor
from walk_ranks import alone, local, of_all

from fused_losses.centers import ClassCenters, carry_over
from fused_losses.centers.sampling import sample
from fused_losses.margins import CosFace

C, D, SEED = 11, 4, 3
CLOSE = dict(rtol=1e-10, atol=1e-10)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", dict(lr=0.3, weight_decay=0.01)),
    "momentum": ("sgd", dict(lr=0.2, momentum=0.9, weight_decay=0.01, dampening=0.3)),
    "scheduled": ("sgd", dict(lr=0.2, weight_decay=0.01, dampening=0.3)),
    "nesterov": ("sgd", dict(lr=0.2, momentum=0.9, weight_decay=0.01, nesterov=True)),
    "adamw": ("adamw", dict(lr=0.05, weight_decay=0.1)),
    "adagrad": ("adagrad", dict(lr=0.1, lr_decay=0.05, weight_decay=0.02)),
}


class HeadWalk:
    """kind: of KINDS; form: of dense_head.FORMS; the others are the head's own options.

    A bias is of one centre a class.
    """

    def __init__(
        self,
        kind: str,
        *,
        update: str,
        rate: float,
        centers: int = 1,
        clip: float | None = None,
        nonfinite: str = "raise",
        form: str = "cosine",
        every: int = 1,
    ) -> None:
        self.kind, self.rate, self.form = kind, rate, form
        centers = 1 if form == "bias" else centers
        self.optimizer, self.options = KINDS[kind]
        self.made = dict(
            update=update, sample_rate=rate, sub_centers=centers, max_grad_norm=clip,
            optimizer=self.optimizer, optimizer_options=self.options, nonfinite=nonfinite,
            every=every if update == "backward" else 1,
        )  # fmt: skip
        self.classes = C
        joined = dist.is_initialized()
        self.group = dist.group.WORLD if joined else None
        self.head = self.build()
        whole = self.whole(self.head.weight)
        self.model = DenseHead(whole, self.optimizer, self.options, form)

    def build(self, **changed: Any) -> ClassCenters:
        forms: dict[str, dict[str, Any]] = {
            "cosine": dict(margin=CosFace(MARGIN), scale=SCALE),
            "class margins": dict(margin=CosFace(class_margins(self.classes)), scale=SCALE),
            "bias": dict(margin=None, normalize=False, scale=PLAIN_SCALE, bias=True),
        }
        fixed = dict(
            dtype=torch.float64, **forms[self.form], seed=SEED,
            gradient_scale="global_sum", chunk_bytes=3 * D * 8, process_group=self.group,
        )  # fmt: skip
        return ClassCenters(self.classes, D, **{**fixed, **self.made, **changed})

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def whole(self, local: Tensor) -> Tensor:
        """The rows of all ranks."""
        return torch.cat(of_all(self.world, local.detach().clone()))

    # ---- what compares ----

    def check(self) -> None:
        """The table and what the optimiser keeps, on a settled head."""
        head, own = (
            self.head,
            slice(self.head.class_start, self.head.class_start + self.head.num_local),
        )
        head.settle()
        torch.testing.assert_close(head.weight.detach(), self.model.weight.detach()[own], **CLOSE)
        assert head.step_count == self.model.steps
        for name, state in head.row_states().items():
            expected = self.model.states.get(name)
            expected = torch.zeros_like(self.model.weight) if expected is None else expected
            torch.testing.assert_close(state, expected[own], **CLOSE)

    def _batch(self, seed: int, ignored: bool) -> tuple[Tensor, Tensor, slice]:
        """All ranks' rows, and which are this one's: any split, empty parts among them."""
        draw = torch.Generator().manual_seed(seed)
        n = int(torch.randint(0, 8, (), generator=draw))
        x = torch.randn(n, D, dtype=torch.float64, generator=draw)
        y = torch.randint(0, self.classes, (n,), generator=draw)
        if ignored and n:
            y[n // 2] = -100
            x[n // 2] = torch.nan
        cuts = sorted(torch.randint(0, n + 1, (self.world - 1,), generator=draw).tolist())
        rank = dist.get_rank(self.group) if self.world > 1 else 0
        bounds = [0, *cuts, n]
        return x, y, slice(bounds[rank], bounds[rank + 1])

    def _forward(
        self, seed: int, ignored: bool = False, training: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, slice]:
        x, y, own = self._batch(seed, ignored)
        mine = x[own].clone().requires_grad_()
        loss = self.head(mine, y[own])
        drawn = (
            sample(0, self.classes, self.rate, seed=SEED, step=self.model.steps)
            if self.rate < 1
            else None
        )
        part = self.model.taking_part(y, drawn) if training else None
        whole = x.clone().requires_grad_()
        expected = self.model.loss(whole, y, part)
        torch.testing.assert_close(loss.detach(), expected.detach(), **CLOSE)
        return loss, mine, expected, whole, part, own

    def _compare_dx(
        self, mine: Tensor, expected: Tensor, whole: Tensor, own: slice, factor: float
    ) -> None:
        dx = torch.zeros_like(whole)
        if expected.requires_grad:
            found = torch.autograd.grad(expected, whole, retain_graph=True, allow_unused=True)[0]
            dx = dx if found is None else torch.nan_to_num(found) * factor
        torch.testing.assert_close(mine.grad, dx[own], **CLOSE)

    def _back(self, seed: int, ignored: bool, factor: float) -> None:
        loss, mine, expected, whole, part, own = self._forward(seed, ignored)
        (loss * factor).backward()
        self._compare_dx(mine, expected, whole, own, factor)
        if self.trains:
            self.model.backward(expected * factor, part)
            if not self.at_step and self.model.backwards >= self.head.every:
                self.model.step(self.head.max_grad_norm)

    # ---- what is done ----

    @property
    def trains(self) -> bool:
        return self.head.training and any(p.requires_grad for p in self.head.parameters())

    @property
    def at_step(self) -> bool:
        return self.head.update_at == "step"

    def train_step(self, seed: int, ignored: bool, factor: float) -> None:
        self._back(seed, ignored, factor)
        self.head.optimizer.step()
        self.model.step(self.head.max_grad_norm)

    def accumulate(self, seed: int, ignored: bool, factor: float) -> None:
        """A backward without a step; inside backward it is one, or a part of one."""
        self._back(seed, ignored, factor)

    def set_every(self, count: int) -> None:
        if not self.at_step:
            self.head.every = count

    def forward_alone(self, seed: int) -> None:
        """A loss that is thrown away, and one without gradients: that of the next step."""
        self._forward(seed)
        with torch.no_grad():
            self._forward(seed)

    def evaluate(self, seed: int) -> None:
        """A loss over all classes, and its gradient for the embeddings alone."""
        self.head.eval()
        loss, mine, expected, whole, _, own = self._forward(seed, training=False)
        loss.backward()
        self._compare_dx(mine, expected, whole, own, 1.0)
        self.head.train()

    def optimizer_step(self) -> None:
        self.head.optimizer.step()
        self.model.step(self.head.max_grad_norm)

    def zero_grad(self) -> None:
        self.head.optimizer.zero_grad()
        self.model.forget()

    def scale_grad(self, factor: float) -> None:
        """Of what waits, and of nothing else."""
        if not self.at_step or not self.model.backwards:
            return
        norm = self.head.grad_norm()
        torch.testing.assert_close(norm, float(self.model.grad.norm()), **CLOSE)
        self.head.scale_grad(factor)
        self.model.grad *= factor

    def schedule(self, seed: int) -> None:
        """Hyper-parameters as a schedule leaves them."""
        draw = random.Random(seed)
        new: dict[str, Any] = {
            "lr": draw.choice([0.0, 0.01, 0.2]),
            "weight_decay": draw.choice([0.0, 0.05]),
        }
        if self.kind in ("momentum", "scheduled"):
            new["momentum"] = draw.choice([0.0, 0.5, 0.9])
        self.set_options(**new)

    def set_options(self, **new: Any) -> None:
        self.head.optimizer.param_groups[0].update(new)
        self.model.options.update(new)

    def clip(self, norm: float | None) -> None:
        self.head.max_grad_norm = norm

    def settle(self) -> None:
        self.head.settle()

    def save_and_load(self, strict: bool) -> None:
        """Into a new head, by bytes; what waited is lost, hyper-parameters are set again."""
        file = io.BytesIO()
        torch.save(self.head.state_dict(), file)
        file.seek(0)
        self._go_on(self.build())
        self.head.load_state_dict(torch.load(file, weights_only=True), strict=strict)

    def tensors(self) -> None:
        """By `state()` and `load()`, filled in place as torch.distributed.checkpoint does."""
        saved = {name: local(t).clone() for name, t in self.head.state().items()}
        self._go_on(self.build())
        state = self.head.state()
        state.expect(saved)
        with torch.no_grad():
            for name, tensor in saved.items():
                local(state[name]).copy_(tensor)
        self.head.load()

    def optimizer_state(self) -> None:
        """The table from one place and the rest from `optimizer.state_dict()`, as torch has it."""
        rows = {"weight": self.head.weight.detach().clone()}
        told = copy.deepcopy(self.head.optimizer.state_dict())
        self._go_on(self.build())
        self.head.load_state_dict(rows, strict=False)
        self.head.optimizer.load_state_dict(told)

    def others_state(self, strict: bool) -> None:
        """Of a head with an optimiser of another kind: refused before anything is written."""
        kind = "adagrad" if self.optimizer == "adamw" else "adamw"
        other = self.build(optimizer=kind, optimizer_options={}).state_dict()
        if strict:
            with pytest.raises(RuntimeError, match="optimizer"):
                self.head.load_state_dict(other)
            return
        rows = self.head.weight.detach().clone()
        with pytest.warns(UserWarning, match="left out"):
            self.head.load_state_dict({**other, "weight": rows}, strict=False)
        self.zero_grad()

    def copy(self, way: str, seed: int) -> None:
        """Goes on in the copy; what the old one does after that is its own affair."""
        old = self.head
        if way == "pickle" and self.world == 1 and dist.is_initialized():
            return  # a head over some of the ranks says that it cannot be pickled
        made = copy.deepcopy(old) if way == "deepcopy" else pickle.loads(pickle.dumps(old))
        x, y, own = self._batch(seed, ignored=False)
        old(x[own].requires_grad_(), y[own]).backward()
        old.optimizer.step()
        self.head = made
        self.model.forget()

    def freeze(self, frozen: bool, way: str) -> None:
        """By whichever tensor; all of them have one flag."""
        ways = {
            "head": [self.head],
            "table": [self.head.weight],
            "parameters": [*self.head.parameters()],
            "optimizer": self.head.optimizer.param_groups[0]["params"],
        }
        for each in ways[way]:
            each.requires_grad_(not frozen)

    def only_dx(self, seed: int) -> None:
        """What asks for the gradient of the embeddings alone trains nothing."""
        loss, mine, expected, whole, _, own = self._forward(seed)
        (mine.grad,) = torch.autograd.grad(loss, mine)
        self._compare_dx(mine, expected, whole, own, 1.0)

    def cast(self) -> None:
        """To float32 and back: the table and the states are rounded once."""
        self.zero_grad()
        self.head.settle()
        self.head.float().double()
        self.model.round()

    def move(self) -> None:
        self.zero_grad()
        self.head.to("cpu")

    def fault(self, seed: int, at: int) -> None:
        """An interrupt at a chunk of rows: those before it have been stepped.

        Over several ranks in optimizer.step(), in which none waits for another.
        """
        if not self.trains or (self.world > 1 and not self.at_step):
            return
        rows, first = self.head._updates.rows, self.head.class_start
        stepped: list[Tensor] = []
        real = type(rows).update

        def update(rows_or_slice: Any, grad: Tensor) -> None:
            if len(stepped) + 1 == at:
                raise KeyboardInterrupt
            real(rows, rows_or_slice, grad)
            stepped.append(torch.arange(self.head.num_local)[rows_or_slice] + first)

        rows.update, broken = update, False
        try:
            loss, _, expected, _, part, _ = self._forward(seed)
            self.model.backward(expected, part)
            loss.backward()
            self.head.optimizer.step()
        except KeyboardInterrupt:
            broken = True
        finally:
            del rows.update
        done = torch.cat([torch.empty(0, dtype=torch.int64), *stepped])
        parts = of_all(self.world, (broken, done))
        ids = torch.cat([mine for _, mine in parts])
        if not any(one for one, _ in parts):
            self.model.step(self.head.max_grad_norm)
        elif self.world > 1 or len(ids):
            self.model.step(self.head.max_grad_norm, only=ids)
        self.zero_grad()

    def not_finite(self, seed: int) -> None:
        """A step with NaN in it is refused or left out, before any row is written."""
        x, y, own = self._batch(seed, ignored=False)
        if not len(x) or not self.trains:
            return
        x[0, 0] = torch.nan
        skipped = self.head.skipped_steps
        refused = self.made["nonfinite"] == "raise"
        with pytest.raises(FloatingPointError) if refused else nullcontext():
            self.head(x[own].requires_grad_(), y[own]).backward()
            self.head.optimizer.step()
        assert self.head.skipped_steps == skipped + (not refused)
        self.zero_grad()

    def resize(self, classes: int) -> None:
        """Rows in common go over, with what the optimiser keeps of them; the others are drawn."""
        self.classes = classes
        old, new = self.head, self.build()
        drawn = self.whole(new.weight)
        carry_over(old, new)
        self._go_on(new)
        self.model.resize(drawn)

    def other_world(self) -> None:
        """The tables of all ranks on each of them alone, or those of one cut over all."""
        if not dist.is_initialized():
            return
        tables = {
            name: self.whole(local(t)) if t.dim() > 1 else t
            for name, t in self.head.state().items()
        }
        world = dist.group.WORLD
        self.group = world if self.group is not world else alone()
        self._go_on(self.build())
        first = self.head.class_start
        state = self.head.state()
        state.expect(tables)
        with torch.no_grad():
            for name, tensor in tables.items():
                mine = slice(first, first + self.head.num_local)
                local(state[name]).copy_(tensor[mine] if tensor.dim() > 1 else tensor)
        self.head.load()

    def _go_on(self, head: ClassCenters) -> None:
        """With another head of this training."""
        group = {k: v for k, v in self.head.optimizer.param_groups[0].items() if k != "params"}
        head.requires_grad_(self.trains)
        head.optimizer.param_groups[0].update(group)
        head.max_grad_norm, head.every = self.head.max_grad_norm, self.head.every
        self.head = head
        self.model.forget()
