"""Does every refinement keep what it should, and does each gain what it is for?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qpass
from qpass.calibrate.store import Store
from qpass.errors import BadInput, UnknownName
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.plan import Recipe
from qpass.plan.refiner import REFINERS
from qpass.refine import errors
from qpass.refine.errors import find_costs
from qpass.refine.outputs import _Pull
from qpass.refine.soft import SoftWeight
from qpass.rounding import ROUNDINGS
from tests.refine.driver import INT8_TOKENS, Small, bytes_of, lost, refining, rows
from tests.rounding.test_rounding import random_weight

EACH = pytest.mark.parametrize("name", sorted(r.name for r in REFINERS))
LEARNED = ("blocks", "norms", "outputs", "discquant")
SPECS = {
    "int2": QuantSpec("int2", "channel", symmetric=False),
    "nvfp4": QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True),
    "tensor": QuantSpec("int4", "tensor"),
}


@EACH
def test_the_same_task_gives_the_same_bytes(name: str) -> None:
    one, other, start = (refining("gpt2") for _ in range(3))
    notes = [REFINERS[name].refine(task) for task in (one, other)]
    assert notes[0] == notes[1]
    assert bytes_of(one) == bytes_of(other)
    assert (bytes_of(one) != bytes_of(start)) is any(note.done for note in notes[0])


@EACH
@pytest.mark.parametrize("spec", SPECS)
def test_any_format_and_quantized_activations(name: str, spec: str) -> None:
    task = refining("llama", SPECS[spec], activation=INT8_TOKENS)
    before = lost(task)
    REFINERS[name].refine(task)
    # what few data ask for may cost a little elsewhere
    assert lost(task) < 1.2 * before


@EACH
@pytest.mark.parametrize("model", ["bert", "vision", "gpt_neox"])
def test_any_architecture(name: str, model: str) -> None:
    task = refining(model)
    before = lost(task)
    assert REFINERS[name].refine(task)
    assert lost(task) < 1.2 * before


@EACH
def test_one_batch_serves_for_both_halves(name: str) -> None:
    task = refining("gpt2", count=1, weigh_tokens=False)
    before = lost(task)
    REFINERS[name].refine(task)
    assert lost(task) < 1.2 * before


@pytest.mark.parametrize(("name", "most"), [("blocks", 0.8), ("outputs", 0.8), ("norms", 1.0)])
def test_errors_on_unseen_data_fall(name: str, most: float) -> None:
    task = refining("gpt2", count=12)
    before = lost(task)
    REFINERS[name].refine(task)
    assert lost(task) < most * before


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_worse_on_held_out_data_is_not_taken(name: str) -> None:
    task, start = refining("gpt2"), refining("gpt2")
    far = {"rate": 40.0} if name == "norms" else {"rate": 40.0, "scale_rate": 40.0}
    notes = replace(REFINERS[name], **far).refine(task)
    assert not any(note.done for note in notes)
    assert bytes_of(task) == bytes_of(start)


RECIPE = {"weight": {"format": "int3"}, "rotation": "off"}


@EACH
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Store.write

    def dies(self: Store, site: str, codes: QuantizedTensor) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(site)
        write(self, site, codes)

    def run(resume: Path | None) -> dict[str, torch.Tensor]:
        recipe = {**RECIPE, "refine": name}
        return qpass.quantize(Small(), recipe, calibration=rows(), resume=resume).state_dict()

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    resumed, whole = run(tmp_path / "run"), run(None)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


@pytest.mark.parametrize("rotation", ["off", "on"])
def test_norms_hold_what_was_found(rotation: str) -> None:
    recipe = {**RECIPE, "rotation": rotation}
    refined, plain = (
        qpass.quantize(Small(), {**recipe, "refine": refine}, calibration=rows()).state_dict()
        for refine in ("norms", "off")
    )
    changed = {key for key, value in refined.items() if not torch.equal(value, plain[key])}
    assert changed
    assert all(key.startswith("norms.") for key in changed)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.layer(self.norm(x))
        return x


@pytest.mark.parametrize("name", ["norms", "bias", "blocks"])
def test_what_is_read_twice_stays_and_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qpass")
    one, other = (
        qpass.quantize(Twice(), {**RECIPE, "refine": refine}, calibration=rows()).state_dict()
        for refine in (name, "off")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    why = {
        "norms": "has a norm with a gain of its own",
        "bias": "is read in several places",
        "blocks": "no value of the model is a bottleneck",
    }
    assert any(why[name] in record.getMessage() for record in caplog.records)


def test_refinements_need_data_and_a_name() -> None:
    recipe = {"weight": {"format": "int4"}, "rounding": "nearest", "refine": "blocks"}
    with pytest.raises(BadInput, match="rests on data, and there is none"):
        qpass.quantize(Small(), recipe, inputs=rows()[0])
    with pytest.raises(UnknownName, match="no refinement named 'block'; did you mean 'blocks'"):
        Recipe.read({**recipe, "refine": "norms+block"})


def test_a_recipe_says_what_refines_it() -> None:
    recipe = Recipe.read({"weight": {"format": "int4"}, "refine": "blocks+norms"})
    assert recipe.refinements == ("blocks", "norms")
    assert recipe.table()["refine"] == "blocks+norms"
    assert "refine" not in Recipe.read({"weight": {"format": "int4"}}).table()


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_takes_the_mean_error(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data = list(3 + torch.randn(8, 400, 6, generator=generator))
    x = torch.cat(data)

    def shift(refine: str) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4))
        want = model[0](x).detach()
        recipe = {"weight": {"format": "int2"}, "rounding": "nearest", "rotation": "off"}
        fields = {"refine": refine, "weigh_tokens": False}
        qpass.quantize(model, {**recipe, **fields}, calibration=data)
        error = model[0](x).detach() - want
        return float(error.mean(0).norm()), float(error.std(0).norm())

    (before, spread), (after, same_spread) = shift("off"), shift("bias")
    assert after < 1e-3 * before
    assert same_spread == pytest.approx(spread, rel=1e-4)


def test_the_pull_of_discquant_alone_is_nearest_rounding() -> None:
    weight = random_weight(6, 32, 3)
    spec = QuantSpec("int3", 16)
    start = ROUNDINGS["nearest"].round(weight, spec, {})
    shifted = QuantizedTensor(
        spec,
        spec.codes.encode(spec.codes.decode(start.codes_nk) + 1),
        start.row_scales_n,
        start.group_scales_ng,
    )
    soft = SoftWeight(shifted, weight, torch.float32, relaxed=True)
    pull = _Pull(soft)
    with torch.no_grad():
        for step in range(10):
            pull.step(2 * (1 - step / 10) / 10)
    soft.settle()
    assert torch.equal(soft.codes().codes_nk, start.codes_nk)


def test_directions_are_not_kept_where_they_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    task = refining("gpt2")
    names = ["add_4", "add_7"]
    assert all(cost.root_dd is not None for cost in find_costs(task, names).values())
    monkeypatch.setattr(errors, "MOST", 0)
    found = find_costs(task, names)
    assert all(cost.root_dd is None and cost.rows[0] is not None for cost in found.values())
