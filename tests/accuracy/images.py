"""A model of images: how far their features move, and which class their neighbours have."""

from __future__ import annotations

import functools
import gzip
import subprocess
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from tests.accuracy.grid import OF_OTHERS, SETTINGS
from tests.accuracy.task import Task
from tests.data.fetch import DATA, fresh, publish
from tests.real.models import REAL

PACKAGE = "dataset-fashion-mnist"
SIZE = 112  # pixels to a side: eight patches
TOGETHER = 16
KNOWN = 1000  # images whose class is known
NEIGHBOURS = 10
# what the model was trained with
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def _stored(kind: str) -> tuple[Tensor, Tensor]:
    """Images `[n, 28, 28]` and classes of Fashion-MNIST, which Debian packages."""
    folder = DATA / "fashion"
    if not folder.exists():
        partial = fresh(folder)
        subprocess.run(["apt-get", "download", PACKAGE], check=True, cwd=partial)
        (package,) = partial.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(partial)], check=True)
        package.unlink()
        publish(partial, folder)
    pixels = _read(next(folder.rglob(f"{kind}-images-idx3-ubyte.gz")), 16)
    classes = _read(next(folder.rglob(f"{kind}-labels-idx1-ubyte.gz")), 8)
    return pixels.reshape(-1, 28, 28), classes.long()


def _read(path: Path, header: int) -> Tensor:
    return torch.from_numpy(
        numpy.frombuffer(gzip.open(path).read(), numpy.uint8, -1, header).copy()
    )


def _pictures(pixels: Tensor) -> Tensor:
    """`[n, 3, SIZE, SIZE]` as the model reads them."""
    grey = pixels[:, None].float() / 255
    large = torch.nn.functional.interpolate(grey, size=SIZE, mode="bilinear")
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    return (large - mean) / deviation


def calibration(count: int) -> list[dict[str, Tensor]]:
    pixels, _ = _stored("train")
    return [{"pixel_values": part} for part in _pictures(pixels[-count:]).split(TOGETHER)]


def _features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Unit vectors `[n, width]`: the first token's state."""
    with torch.no_grad():
        parts = [
            model(pixel_values=_pictures(part)).last_hidden_state[:, 0].double()
            for part in pixels.split(TOGETHER)
        ]
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def lost(model: nn.Module, reference: nn.Module, every: int) -> tuple[dict[str, float], int]:
    known, classes = (t[:KNOWN] for t in _stored("train"))
    asked, answers = (t[:: 10 * every] for t in _stored("t10k"))
    got_nd, want_nd = _features(model, asked), _features(reference, asked)
    values = {
        "1 - cosine": 1 - float((got_nd * want_nd).sum(-1).mean()),
        "right": _right(_features(model, known), classes, got_nd, answers),
        "float right": _right(_features(reference, known), classes, want_nd, answers),
    }
    return values, len(answers)


def judged(model: nn.Module, reference: nn.Module) -> float:
    # before those that are calibrated on
    pixels = _stored("train")[0][-4 * TASK.amount :][: 2 * TOGETHER]
    return 1 - float((_features(model, pixels) * _features(reference, pixels)).sum(-1).mean())


def _right(known_md: Tensor, classes: Tensor, asked_nd: Tensor, answers: Tensor) -> float:
    """How often the commonest class of the nearest neighbours is the answer."""
    near = (asked_nd @ known_md.mT).topk(NEIGHBOURS).indices
    return float((classes[near].mode(-1).values == answers).double().mean())


TASK = Task(
    read=REAL["dinov2"].read,
    calibration=calibration,
    sample=lambda: calibration(TOGETHER)[0],
    lost=lost,
    judged=judged,
    amount=128,
    every=2,
    seeds=1,
    settings=tuple(SETTINGS),
    methods=OF_OTHERS,
)
