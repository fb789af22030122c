"""Weights of every rank and axis become rows of codes and come back in their shape."""

import pytest
import torch

from qpass.errors import BadInput, UnknownName
from qpass.formats import QuantSpec
from qpass.quantize.weights import (
    as_rows,
    dequantize_weight,
    from_rows,
    quantize_weight,
    refusal,
)

# a step of 8 bits, relative to the largest entry of a row: half for rounding, half for clipping
STEP = 1 / 127


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 8), -1), ((8, 3), 0), ((2, 3, 8), -1), ((2, 8, 3), 1), ((2, 3, 5, 8), 3)],
)
def test_rows_run_along_the_axis_and_come_back(shape: tuple[int, ...], axis: int):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows = as_rows(weight, axis)
    assert rows.shape == (weight.numel() // 8, 8)
    assert torch.equal(from_rows(rows, shape, axis), weight)
    q = quantize_weight(weight, QuantSpec("int8", axis=axis), "nearest")
    error = (dequantize_weight(q, shape, torch.float32) - weight).abs()
    assert (error <= STEP * weight.abs().amax(axis, keepdim=True)).all()


def test_refusals_have_reasons():
    grouped = QuantSpec("int4", 32, scale_format="float16")
    assert refusal((4, 64), grouped) is None
    assert "48 is not a multiple" in (refusal((4, 48), grouped) or "")
    assert "no axis 2" in (refusal((4, 48), QuantSpec("int8", axis=2)) or "")
    with pytest.raises(BadInput, match="per channel"):
        quantize_weight(torch.randn(4, 48), grouped, "nearest")
    with pytest.raises(UnknownName, match="nearest"):
        quantize_weight(torch.randn(4, 64), grouped, "nerest")
