"""Is a weight the same whether it is evaluated at once or some rows at a time?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from qpass.capture import capture
from qpass.ir import Affine, Permute, ScaleAxis, Weight, pieces
from tests import zoo

SOURCES = {
    "w": torch.randn(50, 8, generator=torch.Generator().manual_seed(0)),
    "row": torch.rand(8, generator=torch.Generator().manual_seed(1)),
    "column": torch.rand(50, generator=torch.Generator().manual_seed(2)),
}
ROWWISE = Weight("w").then(Affine(2.0, 1.0)).then(ScaleAxis(Weight("row"), 1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)


def test_pieces_together_are_the_value(small) -> None:
    parts = list(pieces.pieces(ROWWISE, SOURCES))
    assert [len(part) for part in parts] == [12, 12, 12, 12, 2]
    assert torch.equal(torch.cat(parts), ROWWISE.evaluate(SOURCES))


@pytest.mark.parametrize(
    "weight", [ROWWISE.then(ScaleAxis(Weight("column"), 0)), ROWWISE.then(Permute((1, 0)))]
)
def test_rows_that_do_not_change_alone_come_at_once(small, weight: Weight) -> None:
    (whole,) = pieces.pieces(weight, SOURCES)
    assert torch.equal(whole, weight.evaluate(SOURCES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [ROWWISE, Weight("w"), Weight("column")])
def test_values_are_rounded_once(small, weight: Weight, dtype: torch.dtype) -> None:
    found = pieces.as_type(weight, SOURCES, dtype)
    assert found.dtype is dtype
    assert torch.equal(found, weight.evaluate(SOURCES).to(dtype))


def test_whole_numbers_stay_whole(small) -> None:
    sources = {"places": torch.arange(300).reshape(30, 10)}
    found = pieces.as_type(Weight("places"), sources, torch.float32)
    assert torch.equal(found, sources["places"])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert", "vision", "gemma3"])
def test_a_widened_run_never_widens_a_large_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = zoo.specimen(name)
    model, inputs = chosen.build(0), chosen.inputs()
    captured = capture(model, inputs)
    flat = captured.flatten(inputs)
    want = captured.program.run(*flat, widen=True)
    monkeypatch.setattr(pieces, "PIECE", 100)
    widened: list[str] = []
    value = type(captured.program).value

    def seen(program: object, node: fx.Node, *, widen: bool = False) -> Tensor:
        found = value(program, node, widen=widen)
        if found.dim() == 2 and found.numel() > 100 and found.is_floating_point():
            widened.extend(str(user.target) for user in node.users)
        return found

    monkeypatch.setattr(type(captured.program), "value", seen)
    got = captured.program.run(*flat, widen=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert not {"aten.linear.default", "aten.embedding.default"} & set(widened)


@pytest.mark.parametrize("recipe", ["w4a16-g64", "w4a8"])
def test_models_are_the_same_when_their_weights_are_cut(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> nn.Module:
        chosen = zoo.specimen("llama")
        fields = {"recipe": recipe, "weight": {"block": 16}} if "g64" in recipe else recipe
        return qpass.quantize(chosen.build(0).float(), fields, inputs=chosen.inputs())

    want = made().state_dict()
    monkeypatch.setattr(pieces, "PIECE", 100)
    got = made().state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
