"""llm-compressor: random Hadamard rotations where activations are quantized, then GPTQ."""

from __future__ import annotations

import functools

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.peers.measure import Given, main


def _integers(bits: int, group: int | None = None, symmetric: bool = True) -> dict[str, object]:
    strategy: dict[str, object] = {"strategy": "channel"}
    if group is not None:
        strategy = {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


def _tokens(bits: int) -> dict[str, object]:
    return {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
    }  # fmt: skip


def quantized(
    given: Given,
    *,
    weights: dict[str, object] | None = None,
    activations: dict[str, object] | None = None,
    scheme: str | None = None,
    rotate: bool = False,
) -> tuple[nn.Module, str]:
    model = given.read()
    if scheme is not None:
        quantizing = GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    else:
        group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
        if activations is not None:
            group["input_activations"] = activations
        quantizing = GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"])
    steps: list[object] = [quantizing]
    if rotate:
        steps.insert(
            0, SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard")
        )
    rows = [{"input_ids": row, "attention_mask": row * 0 + 1} for row in given.calibration]
    loader = DataLoader(rows, batch_size=1)  # type: ignore
    found = oneshot(model=model, dataset=loader, recipe=steps, num_calibration_samples=len(rows))
    how = f"{'random Hadamard, ' if rotate else ''}GPTQ, {len(rows)} samples"
    return found, how


def _batch(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return row


if __name__ == "__main__":
    run = functools.partial
    main(
        {
            "W8A8": run(quantized, weights=_integers(8), activations=_tokens(8)),
            "W4A8": run(quantized, weights=_integers(4), activations=_tokens(8), rotate=True),
            "W4A4": run(quantized, weights=_integers(4), activations=_tokens(4), rotate=True),
            "W4A16 g64": run(quantized, weights=_integers(4, 64)),
            "W4A16 g64 asymmetric": run(quantized, weights=_integers(4, 64, symmetric=False)),
            "W3A16 g64": run(quantized, weights=_integers(3, 64)),
            "W2A16 g64": run(quantized, weights=_integers(2, 64)),
            "NVFP4": run(quantized, scheme="NVFP4"),
            "MXFP4": run(quantized, scheme="MXFP4"),
        }
    )
