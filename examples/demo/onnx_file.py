"""Does ONNX Runtime compute from the exported file what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import qpass
from examples.demo.measure import weights
from examples.demo.rows import EXPORTED, load
from examples.demo.settings import Settings
from examples.demo.store import Store
from qpass.report.table import megabytes

FILE = "model.onnx"


def export(settings: Settings, store: Store, text: Tensor) -> str:
    """Write the file of one row; say how far its logits on `text [1, t]` are from PyTorch's."""
    model = load(EXPORTED, weights(EXPORTED, settings, store))

    def write(folder: Path) -> None:
        folder.mkdir()
        qpass.export_onnx(model, text, folder / FILE)

    folder = store.done("onnx", write)
    with torch.no_grad():
        want = model(text).logits
    got = run(folder / FILE, text)
    size = megabytes(sum(file.stat().st_size for file in folder.iterdir()))
    error = float((got - want).norm() / want.norm())
    same = float((got.argmax(-1) == want.argmax(-1)).float().mean())
    return (
        f"{folder / FILE}, {EXPORTED.name}, {size:.1f} MB: the logits of ONNX Runtime differ from "
        f"those of PyTorch by {error:.1e} (relative, {text.shape[1]} positions), the top token is "
        f"the same at {same:.1%}"
    )


def run(path: Path, ids: Tensor) -> Tensor:
    """The logits of an exported file for tokens without a past."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # products with 4-bit weights in float32, as PyTorch computes them
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    b, t = ids.shape
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones(b, t, dtype=torch.int64),
        "position_ids": torch.arange(t).expand(b, t),
    }
    feeds = {}
    for node in session.get_inputs():
        if node.name in given:
            feeds[node.name] = given[node.name].numpy()
        else:
            # the past: [batch, heads, tokens, width]
            _, heads, _, width = node.shape
            feeds[node.name] = torch.zeros(b, heads, 0, width).numpy()
    return torch.from_numpy(session.run(["logits"], feeds)[0])
