"""Does every public call answer a wrong argument with a QpassError that says what is wrong?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.plan import Online, Plan, Quantized, Recipe, Role, Rotated
from qpass.rotations import Transform
from tests.zoo import specimen, tokens

IDS = tokens()
GOOD = {"input_ids": IDS}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return specimen("llama_tied").build(0).float()


Call = Callable[[nn.Module, object], object]
ON_MODELS: dict[str, Call] = {
    "inspect": lambda model, inputs: qpass.inspect(model, inputs),
    "rotate": lambda model, inputs: qpass.rotate(model, inputs),
    "quantize": lambda model, inputs: qpass.quantize(model, "w8a8", inputs=inputs),
    "export_onnx": lambda model, inputs: qpass.export_onnx(model, inputs, "absent.onnx"),
}


@pytest.fixture(autouse=True)
def unchanged(model: nn.Module, tmp_path: Path, monkeypatch) -> Iterator[None]:
    """A call that is refused leaves the model as it was, and no file."""
    monkeypatch.chdir(tmp_path)
    before = copy.deepcopy(model.state_dict())
    yield
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(tmp_path.rglob("*.onnx")) == []


@pytest.mark.parametrize("call", ON_MODELS)
@pytest.mark.parametrize("wrong", [None, "model", 3, nn.Linear, [nn.Linear(2, 2)], len])
def test_what_is_no_model(call: str, wrong: object) -> None:
    with pytest.raises(qpass.QpassError, match=r"model is .*; expected a torch\.nn\.Module"):
        ON_MODELS[call](wrong, GOOD)


@pytest.mark.parametrize("call", ON_MODELS)
@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (3, "got int"),
        ("text", "got str"),
        ({3}, "got set"),
        (IDS.numpy(), "got ndarray"),
        ([1, 2], "must be Tensor"),
        ({"input_ids": "text"}, "must be Tensor"),
        ({"input_ids": None}, "itself fails"),
        ({"inputs": IDS}, "itself fails"),
        ({}, "itself fails"),
        ((), "itself fails"),
        ({"input_ids": IDS.float()}, "itself fails"),
        (IDS[0], "itself fails"),
        (IDS[:, :0], "itself fails"),
        (IDS + 100, "not in the vocabulary"),
        (IDS - 100, "not in the vocabulary"),
    ],
)
def test_inputs_that_do_not_fit(model: nn.Module, call: str, inputs: object, says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        ON_MODELS[call](model, inputs)


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ([], "has no batches"),
        (iter(()), "has no batches"),
        (IDS, "is one Tensor"),
        (GOOD, "is one dict"),
        ("text", "is one str"),
        (3, "is an int"),
        ([None], "got NoneType"),
        ([1, 2], "got int"),
        (["a", "b"], "got str"),
        ([GOOD, {**GOOD, "attention_mask": IDS}], "but the model was traced on input_ids"),
        ([GOOD, {"input_ids": IDS.float()}], r"is torch\.float32"),
        ([GOOD, {"input_ids": IDS[0]}], "has shape"),
        ([{"input_ids": IDS + 100}], "not in the vocabulary"),
    ],
)
def test_calibration_that_does_not_fit(model: nn.Module, calibration: object, says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        qpass.quantize(model, "w8a8", calibration=calibration)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (7, "expected a name, a path, a table or a Recipe"),
        (None, "expected a name, a path, a table or a Recipe"),
        (["w8a8"], "expected a name, a path, a table or a Recipe"),
        ("w8a9", "did you mean 'w8a8'"),
        (Path("absent.toml"), "cannot be read"),
        ({"rotashun": "on"}, "did you mean 'rotation'"),
        ({"rotation": 7}, '"on" or "off" or "auto"'),
        ({"weight": 3}, "a table"),
        ({3: 4}, "no recipe key named '3'"),
    ],
)
def test_wrong_recipes(model: nn.Module, recipe: object, says: str) -> None:
    with pytest.raises(qpass.QpassError, match=says):
        qpass.quantize(model, recipe, inputs=GOOD)
    if recipe is not None:
        with pytest.raises(qpass.QpassError, match=says):
            qpass.rotate(model, GOOD, recipe)


@pytest.mark.parametrize("plan", [7, {}, "absent.json", Path()])
def test_wrong_plans(model: nn.Module, plan: object) -> None:
    for call in (qpass.quantize, qpass.rotate):
        with pytest.raises(qpass.QpassError, match="plan"):
            call(model, inputs=GOOD, plan=plan)


@pytest.mark.parametrize("part", ["rotated", "online", "quantized"])
def test_a_plan_for_another_model(model: nn.Module, part: str) -> None:
    plan = Plan(
        Recipe("other"),
        rotated=(Rotated("far.weight[0:8]", Transform("hadamard", 8, 0)),),
        online=(Online("far.weight", Transform("hadamard", 8, 0)),),
        quantized=(Quantized("far.weight", Role.LINEAR, QuantSpec("int8"), None, "nearest"),),
    )
    empty = {key: () for key in ("rotated", "online", "quantized") if key != part}
    for call in (qpass.quantize, qpass.rotate):
        with pytest.raises(BadInput, match=r"plan: the model has no .* far\.weight"):
            call(model, inputs=GOOD, plan=replace(plan, **empty))


@pytest.mark.parametrize("where", [3, None, ["out"]])
def test_what_is_no_path(model: nn.Module, where: object) -> None:
    with pytest.raises(qpass.QpassError, match="where is"):
        qpass.save(model, where)
    with pytest.raises(qpass.QpassError, match="where is"):
        qpass.load(where)
    with pytest.raises(qpass.QpassError, match="path is"):
        qpass.export_onnx(model, GOOD, where)


def test_save_and_load_take_modules(tmp_path: Path) -> None:
    qpass.save(nn.Linear(3, 2), tmp_path / "plain")
    with pytest.raises(qpass.QpassError, match="model is a str"):
        qpass.save("model", tmp_path / "out")
    with pytest.raises(qpass.QpassError, match="model is a str"):
        qpass.load(tmp_path / "plain", "model")


def test_evaluate_takes_models_and_batches(model: nn.Module) -> None:
    for one, other in (("model", model), (model, None)):
        with pytest.raises(qpass.QpassError, match=r"expected a torch\.nn\.Module"):
            qpass.evaluate(one, other, [IDS])
    for batches in ([], None, 3, IDS, GOOD, [1], ["a"], [IDS + 100], [IDS.float()], [IDS[0]]):
        with pytest.raises(qpass.QpassError):
            qpass.evaluate(model, model, batches)


def test_a_quantized_model_is_not_started_from() -> None:
    small = qpass.quantize(specimen("llama_tied").build(0).float(), "w8a8", inputs=GOOD)
    outer = nn.Sequential(small)
    for started in (small, outer):
        for call in (qpass.inspect, qpass.rotate, qpass.quantize):
            with pytest.raises(qpass.QpassError, match="quantized already"):
                call(started, inputs=(IDS,))


def test_what_a_loader_raises_is_its_own(model: nn.Module) -> None:
    def batches() -> Iterator[object]:
        yield GOOD
        raise LookupError("the loader's own error")

    with pytest.raises(LookupError, match="the loader's own error"):
        qpass.quantize(model, "w8a8", calibration=batches())
