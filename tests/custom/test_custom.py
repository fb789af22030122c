"""Do models that users write themselves stay the same function, and can they be quantized?"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qpass
import qpass.backend
import qpass.targets.inductor
from tests.custom.base import CUSTOM, Custom

for module in ("builtin", "decoders", "experts", "language", "recurrent", "vision"):
    importlib.import_module(f"tests.custom.{module}")

# what PyTorch itself says about some of these models
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched src_key_padding_mask"),
    pytest.mark.filterwarnings("ignore:a graph is left to inductor unquantized"),
]

# in float64, on all calls; a wrong fold measures above 1e-3
EXACT = {torch.float64: 1e-9, torch.float16: 4e-3}
# relative to the largest entry: eight bits on both sides, and four bits of weights that are noise
NEAR = {"w8a8": 0.25, "w4a8": 1.0}

# models that no trace shows as a whole, each because of a branch or a write
IN_PARTS = {"Branching", "EncoderMasked", "MaxNorm", "Seq2Seq"}

# one of each kind; the others take as long again
QUICK = {
    "AlibiWindow",
    "BatchedMoe",
    "Branching",
    "Checkpointed",
    "ComplexRope",
    "Conv1dGpt",
    "Dit",
    "Encoder",
    "FunctionalGpt",
    "Looped",
    "LowRank",
    "Mamba",
    "NanoGptSlow",
    "Nested",
    "Returned",
    "StackedRope",
    "UsedTwice",
    "VitToken",
}

every = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, entry in CUSTOM.items()
    ],
)


def outputs(model: nn.Module, call: object) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(call, Mapping):
            found = model(**call)
        else:
            found = model(*call) if isinstance(call, tuple) else model(call)
    found = dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def far(got: list[Tensor], want: list[Tensor]) -> float:
    assert [t.shape for t in got] == [t.shape for t in want]
    assert [t.dtype for t in got] == [t.dtype for t in want]
    wide = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in wide)


@every
def test_rotated_models_are_the_same(entry: Custom) -> None:
    model, ref = entry.model(), entry.model()
    report = qpass.rotate(model, entry.calls[0]())
    assert report.max_error <= 1e-9
    assert report.plan.rotated or report.plan.online
    for call in entry.calls:
        assert far(outputs(model, call()), outputs(ref, call())) <= EXACT[entry.dtype]
    parts = any("captured in" in note.why for note in report.notes)
    assert parts == (type(model).__name__ in IN_PARTS)


@every
def test_inspection_changes_nothing(entry: Custom) -> None:
    model, ref = entry.model(), entry.model()
    found = qpass.inspect(model, entry.calls[0]())
    assert found.products
    assert str(found)
    if type(model).__name__ != "MaxNorm":  # whose own calls change its table
        for one, other in zip(model.parameters(), ref.parameters(), strict=True):
            assert torch.equal(one, other)


@every
@pytest.mark.parametrize("recipe", sorted(NEAR))
def test_quantized_models_are_near(entry: Custom, recipe: str, tmp_path) -> None:
    model, ref = entry.model(), entry.model()
    qpass.quantize(model, {"recipe": recipe, "rotation": "on"}, inputs=entry.calls[0]())
    for call in entry.calls:
        assert far(outputs(model, call()), outputs(ref, call())) <= NEAR[recipe]
    qpass.save(model, tmp_path / "saved")
    back = qpass.load(tmp_path / "saved", entry.model())
    # float products of the same numbers elsewhere in memory
    call = entry.calls[-1]
    assert far(outputs(back, call()), outputs(model, call())) <= EXACT[entry.dtype]


@every
def test_compiled_models_are_near(entry: Custom, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_graph(graph, inputs, config_patches=None):
        return graph

    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", run_graph)
    monkeypatch.setattr(qpass.backend, "compile_fx", run_graph)
    torch._dynamo.reset()
    model, ref = entry.model(), entry.model()
    model.compile(backend="qpass", options={"recipe": "w8a8"})
    for call in entry.calls:
        assert far(outputs(model, call()), outputs(ref, call())) <= NEAR["w8a8"]
