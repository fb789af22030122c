"""A real checkpoint that was stored in blocks (GGUF Q4_1) is rounded without any loss."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS

MODEL = Path(__file__).parents[2] / ".data" / "smollm2" / "model.safetensors"
Q4_1 = QuantSpec("int4", 32, scale_format="float16", symmetric=False)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason=f"needs {MODEL}; make it with tests/data/fetch.py")
def test_every_linear_of_a_q4_1_checkpoint_is_exact():
    seen = 0
    with safe_open(MODEL, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 -- not a dict
            weight = file.get_tensor(name)
            # the table is the one matrix that the checkpoint stores in another format
            if weight.dim() != 2 or len(weight) > 10_000:
                continue
            got = ROUNDINGS["nearest"].round(weight, Q4_1, {}).dequantize(torch.float32)
            assert torch.equal(got, weight), name
            seen += 1
    assert seen == 210
