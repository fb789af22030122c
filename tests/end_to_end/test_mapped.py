"""Does a saved model read its weights from the file itself, where nothing is copied?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import qpass
from qpass.ops.packing import LINE
from qpass.targets.layers import QuantizedLinear
from qpass.targets.shards import write_shards
from qpass.targets.tables import QuantizedEmbedding
from tests import zoo

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# of the file and the cache
MOST = 1.2
# what a process holds beyond its imports, once it has loaded a model and made tokens
MEASURED = """
import os, sys, time
import torch
import transformers.models.llama.modeling_llama
import qpass

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

# the highest from here on
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
model = qpass.load(sys.argv[1])
seconds = time.perf_counter() - start
ids = torch.arange(8)[None]
with torch.no_grad():
    made = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
assert made.shape == (1, 72)
print(status("VmHWM") - before, seconds)
"""


def mapped(where: Path) -> list[range]:
    """The addresses at which this process has mapped the files of a directory."""
    found: list[range] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors") and str(where) in line:
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            found.append(range(first, last))
    return found


def inside(tensor: Tensor, places: list[range]) -> bool:
    return any(tensor.data_ptr() in place for place in places)


def load_plain(where: Path) -> nn.Module:
    return qpass.load(where, model=zoo.specimen("nano_gpt").build(1).float())


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "w4a16-g64"])
@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("llama_tied", qpass.load),
        ("llama_tied", hf.AutoModelForCausalLM.from_pretrained),
        ("nano_gpt", load_plain),
    ],
    ids=["load", "from_pretrained", "plain"],
)
def test_weights_lie_where_the_file_is_mapped(
    name: str, through: Callable[[Path], nn.Module], recipe: str, tmp_path: Path
) -> None:
    chosen = zoo.specimen(name)
    model = qpass.quantize(chosen.build(0).float(), recipe, inputs=chosen.inputs())
    qpass.save(model, tmp_path / "out")
    back = through(tmp_path / "out")
    places = mapped(tmp_path / "out")
    layers = [m for m in back.modules() if isinstance(m, QuantizedLinear)]
    assert layers
    for layer in layers:
        assert inside(layer.packed_weight, places)
        assert inside(layer.row_scales, places)
        assert layer.group_scales is None or inside(layer.group_scales, places)
        assert layer.packed_weight.data_ptr() % LINE == 0
    for table in back.modules():
        if isinstance(table, QuantizedEmbedding):
            assert inside(table.codes, places)
    with torch.no_grad():
        got, want = back(**chosen.inputs()), model(**chosen.inputs())
    assert torch.equal(first(got), first(want))


def first(found: object) -> Tensor:
    value = found if isinstance(found, Tensor) else next(iter(found.values()))
    assert isinstance(value, Tensor)
    return value


def test_what_is_mapped_may_be_changed_copied_and_saved_over(tmp_path: Path) -> None:
    chosen = zoo.specimen("llama_tied")
    where, inputs = tmp_path / "out", chosen.inputs()
    qpass.save(qpass.quantize(chosen.build(0).float(), "w4a8", inputs=inputs), where)
    model, before = qpass.load(where), (where / "model.safetensors").read_bytes()
    qpass.save(model, where)
    assert (where / "model.safetensors").read_bytes() == before
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.packed_weight.zero_()
            module.row_scales.fill_(2.0)
    assert (where / "model.safetensors").read_bytes() == before
    model.load_state_dict(state)
    again = qpass.load(where)
    assert torch.equal(first(model(**inputs)), first(again(**inputs)))


def wide(where: Path, layers: int) -> int:
    """Write a decoder of 8-bit and 4-bit weights, each layer the same, and return its bytes."""
    config = hf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    model.init_weights()
    inputs = {"input_ids": torch.arange(8)[None]}
    recipe = {"recipe": "w4a8", "rotation": "off"}
    one = where.with_name("one")
    qpass.save(qpass.quantize(model.eval(), recipe, inputs=inputs), one)
    text = json.loads((one / "config.json").read_text())
    text["num_hidden_layers"] = layers
    section = text["quantization_config"]

    def each(name: str) -> list[str]:
        return [name.replace("layers.0.", f"layers.{i}.") for i in range(layers)]

    section["layers"] = [
        {**form, "path": path}
        for form in section["layers"]
        for path in dict.fromkeys(each(form["path"]))
    ]
    for key in ("folded", "biases"):
        section[key] = {path: v for name, v in section[key].items() for path in each(name)}
    section["touched"] = [
        path[:-1] for n in section["touched"] for path in dict.fromkeys(each(n + "."))
    ]
    where.mkdir()
    (where / "config.json").write_text(json.dumps(text))
    (where / "generation_config.json").write_bytes((one / "generation_config.json").read_bytes())
    tensors = load_file(one / "model.safetensors")
    repeated = {path: t for name, t in tensors.items() for path in each(name)}
    write_shards(where, repeated, 10**10, lambda name: {})
    return (where / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_wide_model_takes_little_more_than_its_file(tmp_path: Path) -> None:
    size = wide(tmp_path / "out", layers=16)
    assert size > 5 * 10**8
    # keys and values of 16 layers, 8 heads of 64, at 72 tokens, in bfloat16
    cache = 2 * 16 * 8 * 64 * 72 * 2
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    held, seconds = map(float, done.stdout.split()[-2:])
    assert held <= MOST * (size + cache), (held, size, seconds)
