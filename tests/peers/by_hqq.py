"""HQQ: half-quadratic quantization of weights, which looks at no data; asymmetric only."""

from __future__ import annotations

import functools

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn

from tests.peers.measure import Given, main


def quantized(given: Given, bits: int) -> tuple[nn.Module, str]:
    model = given.read()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            held = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
            layer.weight = nn.Parameter(held.dequantize(), requires_grad=False)
    return model, "no data"


if __name__ == "__main__":
    main(
        {
            f"W{bits}A16 g64 asymmetric": functools.partial(quantized, bits=bits)
            for bits in (4, 3, 2)
        }
    )
