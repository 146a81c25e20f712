"""Retrieval of glyphs: find a character by its drawing in a font that was never seen.

Classes are characters, pictures their drawings by the installed fonts (matplotlib's own among them:
`pip install 'fused-losses[train]'`). A font's design is held out; its drawings are the queries, one
drawing a character by the other fonts the gallery. The head takes its steps inside backward.

    python examples/glyph_retrieval.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.datasets.glyphs import hold_out, load_glyphs
from fused_losses.margins import CosFace

matplotlib.use("agg")
import matplotlib.pyplot as plt


def network(dim: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(128 * 4 * 4, dim, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm1d(dim, affine=False))


def pictures(images: Tensor) -> Tensor:  # uint8 -> floats around 0
    return images.float() / 128 - 1


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture a little elsewhere, so that no place of the ink is learnt by heart."""
    n = len(images)
    move = (torch.rand(n, 2, generator=generator) - 0.5) * 0.3
    size = 1 + (torch.rand(n, 1, generator=generator) - 0.5) * 0.3
    maps = torch.cat(
        [size, torch.zeros(n, 1), move[:, :1], torch.zeros(n, 1), size, move[:, 1:]], 1
    )
    grid = F.affine_grid(maps.view(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def embed(net: nn.Module, images: Tensor) -> Tensor:
    net.eval()
    rows = torch.cat([net(pictures(part)) for part in images.split(512)])
    net.train()
    return rows


def draw(queries: Tensor, gallery: Tensor, index: Tensor, right: Tensor, out: Path) -> None:
    """Some queries, each with its five nearest; a frame tells what is right."""
    # as many that were found as were not, as far as there are
    found = right[:, 0]
    parts = [which.nonzero()[:, 0] for which in (found, ~found)]
    spread = [
        part[torch.linspace(0, len(part) - 1, 6).long().unique()] for part in parts if len(part)
    ]
    some = torch.cat(spread)
    figure, axes = plt.subplots(len(some), 6, figsize=(5, 0.8 * len(some)), squeeze=False)
    for line, query in zip(axes, some.tolist(), strict=True):
        shown = [queries[query], *gallery[index[query]]]
        for place, (axis, picture) in enumerate(zip(line, shown, strict=True)):
            axis.imshow(255 - picture[0].numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            color = "#00796b" if place and right[query, place - 1] else "#c62828"
            for side in axis.spines.values():
                side.set_color(color if place else "#9e9e9e")
                side.set_linewidth(2)
    axes[0, 0].set_title("query", fontsize=8)
    axes[0, 1].set_title("nearest", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--to", type=lambda told: int(told, 16), default=0x600)
    options.add_argument("--out", type=Path, default=Path("runs/examples/glyph_retrieval.png"))
    args = options.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    train, held, design = hold_out(
        load_glyphs(characters=range(0x21, args.to), processes=1, say=print)
    )
    print(f"{train.classes} characters, {len(train)} drawings; held out: {', '.join(design)}")
    images, labels = train.read(range(len(train))), train.labels
    net = network(64)
    head = fl.ClassCenters(
        train.classes,
        64,
        margin=CosFace(0.2),
        scale=24.0,
        optimizer="sgd",
        optimizer_options=dict(lr=1.0, momentum=0.9),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    first = last = float("nan")
    for step in range(args.steps):
        batch = torch.randint(len(train), (args.batch,), generator=generator)
        loss = head(net(shifted(pictures(images[batch]), generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # the centres have moved
        optimizer.step()
        first, last = (float(loss.detach()) if step == 0 else first), float(loss.detach())
        if step % 50 == 0:
            print(f"step {step}: loss {last:.3f}")

    # one drawing a character, the first
    order = labels.argsort(stable=True)
    sorted_labels = labels[order]
    gallery = order[torch.cat([torch.ones(1, dtype=torch.bool), sorted_labels.diff() != 0])]
    queries = held.read(range(len(held)))
    _, index = fl.pairwise_topk(embed(net, queries), embed(net, images[gallery]), 5, "cosine")
    right = labels[gallery][index] == held.labels[:, None]
    recall = {k: float(right[:, :k].any(1).float().mean()) for k in (1, 5)}
    print(f"{len(queries)} queries: recall@1 {recall[1]:.3f}, recall@5 {recall[5]:.3f}")
    draw(queries, images[gallery], index, right, args.out)
    print(f"picture: {args.out}")
    return {"first": first, "last": last, "recall": recall[1], "classes": float(train.classes)}


if __name__ == "__main__":
    main()
