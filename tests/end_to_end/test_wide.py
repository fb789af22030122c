"""How long, and how much memory, does it take to understand a wide model that holds no values?"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import transformers as hf
from torch import nn

import qpass
from qpass.analyze import largest_regions, rotatable_regions
from qpass.capture import capture
from qpass.errors import BadInput
from qpass.rotations import Group
from tests.zoo import specimen

# seconds of analysis and of `inspect`, and bytes, for sixty layers
ANALYSIS, INSPECTION, MEMORY = 20, 90, 2e9
LAYERS = 60


def wide(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A decoder of width 4,096 on the meta device, and tokens for it."""
    config = hf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config).eval()
    return model, {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}


def test_a_model_without_values_is_inspected_like_any_other() -> None:
    chosen = specimen("llama")
    model, inputs = chosen.build(0).float(), chosen.inputs()
    want = qpass.inspect(model, inputs)
    found = qpass.inspect(model.to("meta"), {k: v.to("meta") for k, v in inputs.items()})
    assert found.tables() == want.tables()
    assert found.coverage == want.coverage


@pytest.mark.parametrize("name", ["llama", "vision"])
def test_a_model_without_values_is_not_changed(name: str) -> None:
    chosen = specimen(name)
    model = chosen.build(0).to("meta")
    inputs = {k: v.to("meta") for k, v in chosen.inputs().items()}
    for change in (qpass.rotate, lambda m, i: qpass.quantize(m, "w8a8", inputs=i)):
        with pytest.raises(BadInput, match="holds no values"):
            change(model, inputs)


def test_the_analysis_of_a_few_wide_layers_takes_its_share_of_the_time() -> None:
    layers = 3
    captured = capture(*wide(layers), blank=True)
    start = time.perf_counter()
    found = largest_regions(captured.program)
    rotatable_regions(captured.program)
    # a fixed part does not grow with the layers
    assert time.perf_counter() - start < ANALYSIS * layers / LAYERS + 1
    kinds = [region.group for region in found]
    assert kinds.count(Group.ROPE_PLANES) == layers
    # what the norms make, and the gated width
    assert kinds.count(Group.DIAGONAL) == (2 * layers + 1) + layers


MEASURE = f"""
import resource, time
import qpass
from qpass.analyze import largest_regions, rotatable_regions
from qpass.capture import capture
from tests.end_to_end.test_wide import wide

model, inputs = wide({LAYERS})
program = capture(model, inputs, blank=True).program
start = time.perf_counter()
largest_regions(program), rotatable_regions(program)
analysis = time.perf_counter() - start
start = time.perf_counter()
found = qpass.inspect(model, inputs)
inspection = time.perf_counter() - start
free = sum(region.free for region in found.regions)
print(free, analysis, inspection, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_sixty_wide_layers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    free, analysis, inspection, memory = map(float, done.stdout.split()[-4:])
    assert free == 6 * LAYERS + 1
    assert analysis <= ANALYSIS, f"{analysis:.0f} s"
    assert inspection <= INSPECTION, f"{inspection:.0f} s"
    assert memory <= MEMORY, f"{memory / 1e9:.1f} GB"
