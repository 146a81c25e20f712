"""Faces: what is read, who is held out, and figures that are those of their definitions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from dataset_pictures import write_faces

from fused_losses import metrics
from fused_losses.train import FoldEmbeddings, evaluate
from fused_losses.train.faces import data
from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.evaluation import PairScores, one_shot_recall, pair_scores

pytest.importorskip("PIL.Image", reason="reading pictures needs Pillow")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"))


def test_pairs_and_recall_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 0, 2])
    scores = pair_scores(x, labels)
    assert sorted(scores.genuine.tolist()) == pytest.approx([0.6, 0.8, 0.96])
    assert len(scores.impostor) == 10 - 3
    # 0 -> 1, 1 -> 3, 3 -> 1: all right; pictures 2 and 4 have no mate and do not count
    assert metrics.recall_at_k(x, labels, metric="dot").value == 1.0
    others = torch.tensor([0, 1, 1, 0, 2])
    assert metrics.recall_at_k(x, others, metric="dot").value == 0.0
    balanced = scores.balanced(0)
    assert len(balanced.genuine) == len(balanced.impostor) == 3
    both, same = scores.listed()
    assert torch.equal(both[same], scores.genuine) and torch.equal(both[~same], scores.impostor)
    assert PairScores(scores.genuine[:0], scores.impostor[:0]).accuracy(0.5) == 0.0


def test_one_shot_recall_is_the_mean_over_every_gallery() -> None:
    generator, between = torch.Generator().manual_seed(3), 0
    for sizes in ((3, 2, 4), (2, 1, 3), (1, 2)):
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        x = torch.nn.functional.normalize(torch.randn(len(labels), 3, generator=generator))
        scores = x @ x.T
        # every gallery of every query, which counts once for each of its mates
        weights, shares = [], []
        for query, person in enumerate(labels.tolist()):
            shown = [
                [i for i, label in enumerate(labels.tolist()) if label == one and i != query]
                for one in range(len(sizes))
            ]
            galleries = list(itertools.product(*shown))
            hits = sum(
                labels[max(gallery, key=lambda i, query=query: scores[query, i])].item() == person
                for gallery in galleries
            )
            if galleries:
                weights.append(sizes[person] - 1)
                shares.append(hits / len(galleries))
        expected = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
        assert one_shot_recall(x, labels) == pytest.approx(expected, abs=1e-12)
        between += 0 < expected < 1
    assert between
    assert math.isnan(one_shot_recall(x[:1], labels[:1]))


def test_no_threshold_sees_the_people_it_judges() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat_interleave(4)

    def fold(noise: float) -> FoldEmbeddings:
        centre = torch.randn(6, 8, generator=generator).repeat_interleave(4, 0)
        rows = centre + noise * torch.randn(24, 8, generator=generator)
        return FoldEmbeddings(torch.nn.functional.normalize(rows), labels)

    folds = [fold(0.3), fold(0.5), fold(0.8)]
    result = evaluate(folds)
    changed = evaluate([folds[0], folds[1], fold(5.0)])
    # fold 2's threshold comes from folds 0 and 1, whatever fold 2 is
    assert result["folds"][2]["threshold"] == changed["folds"][2]["threshold"]
    assert result["folds"][0]["threshold"] != changed["folds"][0]["threshold"]
    assert changed["verification_accuracy"] < result["verification_accuracy"]
    assert len(result["roc"]) == 3 and result["roc"][0] == sorted(result["roc"][0])
    with pytest.raises(ValueError, match="more than one"):
        evaluate(folds[:1])


def test_an_image_folder_is_read(faces: Path, tmp_path: Path) -> None:
    (faces / "p1" / "notes.txt").write_text("not a picture")
    (faces / "empty").mkdir(exist_ok=True)
    pictures = data.image_folder(faces, (24, 20))
    assert pictures.images.shape == (144, 1, 24, 20) and pictures.images.dtype == torch.uint8
    assert pictures.names[:3] == ("p0", "p1", "p2") and pictures.names[-1] == "p23"
    assert pictures.labels.bincount().tolist() == [6] * 24
    assert data.image_folder(faces, (10, 12), 3).images.shape == (144, 3, 10, 12)
    with pytest.raises(ValueError, match="neither"):
        data.image_folder(tmp_path / "absent", (24, 20))
    with pytest.raises(ValueError, match="at least 5 folders"):
        data.image_folder(tmp_path, (24, 20))
    broken = tmp_path / "a" / "x.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    with pytest.raises(RuntimeError, match="x.png: not a picture"):
        data.image_folder(tmp_path, (24, 20))


def test_people_are_held_out_once_and_entirely(faces: Path) -> None:
    pictures = data.image_folder(faces, (24, 20))
    seen: list[str] = []
    for fold in range(4):
        people, held_out = data.split(pictures, fold, seed=3)
        assert not set(people.names) & set(held_out.names)
        assert len(people) + len(held_out) == len(pictures)
        assert sorted(people.labels.unique().tolist()) == list(range(len(people.names)))
        seen += held_out.names
    assert sorted(seen) == sorted(pictures.names)


def test_missing_faces_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"fused-losses\[train\]"):
        data.orl_folder()


def test_every_epoch_shows_every_picture_once() -> None:
    stream = torch.cat([data.batch_indices(10, 4, step, seed=0, fold=0) for step in range(10)])
    for epoch in stream.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(stream[:10], stream[10:20])
    assert len(data.batch_indices(10, 64, 3, seed=0, fold=0)) == 64


def test_augmentation_is_seeded_and_per_picture() -> None:
    images = normalize(torch.randint(0, 256, (1, 1, 20, 16), dtype=torch.uint8)).repeat(6, 1, 1, 1)
    one, two = (augment(images, "full", torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == images.shape
    assert not torch.equal(one[0], one[1])
    assert augment(images, "none", torch.Generator()) is images
    # light keeps the grey values: only flips and shifts
    light = augment(images, "light", torch.Generator().manual_seed(1))
    assert light.max() <= images.max() + 1e-5 and light.min() >= images.min() - 1e-5
