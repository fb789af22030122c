"""Brevitas: Hadamard rotations found in the graph where activations are quantized, then GPTQ."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from brevitas.export.inference.manager import quant_inference_mode
from brevitas_examples.llm import main as tool
from brevitas_examples.llm.llm_args import create_args_parser
from torch import nn

from tests.peers.measure import Given, main

WEIGHTS = [
    "--weight-param-method", "mse", "--weight-quant-type", "sym", "--gptq", "--gpxq-act-order",
]  # fmt: skip
ROTATED = [
    "--rotation", "fused_no_fx", "--rotation-mode", "had", "--rotation-orphan-sink",
    "--rotation-sdpa-regions", "--replace-rmsnorm",
]  # fmt: skip


class _Running(nn.Module):
    """The model with its quantizers in the mode in which they are evaluated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: object) -> object:
        with quant_inference_mode(self.model):
            return self.model(**inputs)


def quantized(given: Given, flags: Sequence[str]) -> tuple[nn.Module, str]:
    rows = [{"input_ids": r[None], "attention_mask": r[None] * 0 + 1} for r in given.calibration]
    tool.get_dataset_for_model = lambda **_: rows
    asked, _ = create_args_parser().parse_known_args(
        ["--model", str(given.model), "--dtype", "float32", *WEIGHTS, *flags]
    )
    tool.llm_collate = lambda **_: lambda batch: batch[0]
    _, model = tool.quantize_llm(asked, [])
    how = f"{'Hadamard, ' if '--rotation' in flags else ''}GPTQ, {len(rows)} samples"
    return _Running(model.eval()), how


def _integers(weight: int, activation: int | None) -> functools.partial[tuple[nn.Module, str]]:
    flags = ["--weight-bit-width", str(weight), "--weight-quant-granularity", "per_channel"]
    if activation is None:
        flags = [
            "--weight-bit-width", str(weight), "--weight-quant-granularity", "per_group",
            "--weight-group-size", "64",
        ]  # fmt: skip
        return functools.partial(quantized, flags=flags)
    # given as the command line's own flags, so that what its users write is what runs
    flags += [
        "--input-bit-width", str(activation), "--input-scale-type", "dynamic",
        "--input-quant-granularity", "per_row", "--input-quant-type", "sym",
    ]  # fmt: skip
    rotated = ROTATED if min(weight, activation) < 8 else []
    return functools.partial(quantized, flags=[*flags, *rotated])


if __name__ == "__main__":
    main(
        {
            "W8A8": _integers(8, 8),
            "W4A8": _integers(4, 8),
            "W4A4": _integers(4, 4),
            "W4A16 g64": _integers(4, None),
            "W3A16 g64": _integers(3, None),
            "W2A16 g64": _integers(2, None),
        }
    )
