"""qpass: a checkpoint that it quantized without data, as the others do, mapped and compiled."""

from __future__ import annotations

from pathlib import Path

import torch

import qpass
from qpass.hf.pretrained import load_model
from tests.bench.engines.by_torch import OPTIONS, Torch
from tests.bench.engines.worker import Setting, main


def load(variant: str, path: Path, setting: Setting) -> Torch:
    torch.set_num_threads(setting.threads)
    model = qpass.load(path)
    engine = Torch(model, setting)
    model.compile(backend="qpass", options=OPTIONS, dynamic=False)
    return engine


def convert(variant: str, checkpoint: Path, out: Path) -> None:
    qpass.save(qpass.quantize(load_model(checkpoint), variant), out)


if __name__ == "__main__":
    main(load, convert)
