"""Two towers, CLIP's way: a scene is seen and told, each in its own coordinates and noise.

Rows of one tower meet those of the other; one streamed sweep has the loss of both directions, and
the temperature is learnt. Judged on scenes that were held out, in both directions.

    python examples/two_modalities.py
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

matplotlib.use("agg")
import matplotlib.pyplot as plt

SEEN, TOLD, SCENE = 96, 40, 10  # sizes of what is seen, told, and behind both


def world(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n scenes as they are seen [n, SEEN] and as they are told [n, TOLD]."""
    maps = torch.Generator().manual_seed(1)  # the same world for every call
    see, bend = torch.randn(SCENE, SEEN, generator=maps), torch.randn(SEEN, SEEN, generator=maps)
    tell = torch.randn(SCENE, TOLD, generator=maps)
    scene = torch.randn(n, SCENE, generator=generator)
    seen = torch.sin(scene @ see / SCENE**0.5) @ bend / SEEN**0.5
    told = torch.tanh(scene @ tell / SCENE**0.5)
    noise = [torch.randn(n, size, generator=generator) for size in (SEEN, TOLD)]
    return seen + 0.3 * noise[0], told + 0.3 * noise[1]


def tower(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 256), nn.GELU(), nn.Linear(256, 64))


def recall(images: Tensor, texts: Tensor) -> float:
    """The mean over both directions of recall@1; row i belongs to row i."""
    ids = torch.arange(len(images))
    ways = ((images, texts), (texts, images))
    found = [fl.metrics.recall_at_k(a, ids, b, ids).value for a, b in ways]
    return sum(value for value in found if isinstance(value, float)) / 2


def draw(steps: list[tuple[int, float, float]], scores: Tensor, out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    at, losses, recalls = zip(*steps, strict=True)
    left.plot(at, losses, color="#616161")
    left.set_xlabel("step")
    left.set_ylabel("loss")
    beside = left.twinx()
    beside.plot(at, recalls, color="#00796b")
    beside.set_ylabel("recall@1, scenes held out", color="#00796b")
    shown = right.imshow(scores.numpy(), cmap="viridis")
    right.set_title("cosines of 32 scenes, seen and told")
    figure.colorbar(shown, ax=right)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--batch", type=int, default=1024)
    options.add_argument("--held-out", type=int, default=1000)
    options.add_argument("--out", type=Path, default=Path("runs/examples/two_modalities.png"))
    args = options.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)

    seen, told = world(args.held_out, torch.Generator().manual_seed(3))
    image, text = tower(SEEN), tower(TOLD)
    log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    parameters = [*image.parameters(), *text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    steps = []
    for step in range(args.steps):
        pictures, captions = world(args.batch, generator)
        loss = fl.info_nce(
            image(pictures),
            text(captions),
            temperature=log_scale.exp().reciprocal(),
            symmetric=True,
            normalize=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, args.steps // 20) == 0 or step == args.steps - 1:
            with torch.no_grad():
                steps.append((step, float(loss.detach()), recall(image(seen), text(told))))
            print(f"step {step}: loss {steps[-1][1]:.3f}, recall@1 {steps[-1][2]:.3f}")
    with torch.no_grad():
        scores = F.normalize(image(seen[:32])) @ F.normalize(text(told[:32])).T
    draw(steps, scores, args.out)
    print(f"temperature {float((-log_scale.detach()).exp()):.4f}; picture: {args.out}")
    return {"first": steps[0][1], "last": steps[-1][1], "recall": steps[-1][2]}


if __name__ == "__main__":
    main()
