"""AutoRound: roundings and clips learned block by block with signed gradients."""

from __future__ import annotations

import functools

from auto_round import AutoRound
from torch import nn
from transformers import AutoTokenizer

from tests.peers.measure import Given, main

ITERATIONS = 50


def quantized(given: Given, scheme: str, **fields: object) -> tuple[nn.Module, str]:
    model = given.read()
    rows = [{"input_ids": row[None]} for row in given.calibration]
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        scheme=scheme,
        dataset=rows,
        iters=ITERATIONS,
        nsamples=len(rows),
        seqlen=given.calibration.shape[1],
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
        **fields,
    )
    found, _ = tool.quantize()
    return found.float(), f"{ITERATIONS} iterations, {len(rows)} samples"


def _groups(bits: int, symmetric: bool) -> functools.partial[tuple[nn.Module, str]]:
    return functools.partial(quantized, scheme="W4A16", bits=bits, group_size=64, sym=symmetric)


if __name__ == "__main__":
    main(
        {
            **{f"W{bits}A16 g64": _groups(bits, True) for bits in (4, 3, 2)},
            "W4A16 g64 asymmetric": _groups(4, False),
            "W2A16 g64 asymmetric": _groups(2, False),
            "MXFP4": functools.partial(quantized, scheme="MXFP4"),
            "NVFP4": functools.partial(quantized, scheme="NVFP4"),
        }
    )
