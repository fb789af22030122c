"""Are limits what a machine can do, and are a model's products found and compared with them?"""

from __future__ import annotations

import math

import pytest
import torch

import qpass
from qpass.errors import BadInput
from qpass.report.speed import machine_table
from qpass.runtime import native, roofline
from qpass.runtime.products import allowed, measure_products
from qpass.runtime.roofline import Limits, Roofline
from tests.zoo import specimen

QUICK = {"seconds": 0.002, "largest": 2**22}
# numbers that no measurement would give
MADE_UP = Limits(2, ((2**10, 64.0), (2**20, 32.0)), integer=8.0, bfloat16=4.0, float32=2.0)


@pytest.fixture(scope="module")
def machine() -> Roofline:
    return roofline.measure(**QUICK)


def test_every_limit_is_a_rate(machine: Roofline) -> None:
    threads = torch.get_num_threads()
    assert [at.threads for at in machine.limits] == sorted({1, threads})
    for at in machine.limits:
        assert [size for size, _ in at.reads] == [2**18, 2**20, 2**22]
        rates = [*(rate for _, rate in at.reads), at.bfloat16, at.float32]
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(native.load().why is not None, reason="no compiled kernels")
def test_better_instructions_multiply_faster() -> None:
    newest = native.load().newest
    peaks = {}
    for isa in (native.Isa.PORTABLE, newest):
        with native.capped(isa):
            found = roofline.measure(**QUICK)
        peaks[isa] = found.limits[0].integer
        assert found.kernel == f"limits_{isa.name.lower()}"
    assert all(peak > 0 for peak in peaks.values())
    if newest > native.Isa.AVX2:
        # several times in fact; some other program may have run meanwhile
        assert peaks[newest] > peaks[native.Isa.PORTABLE]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_every_set_multiplies_every_type(dtype: torch.dtype) -> None:
    found = native.load()
    if found.newest is None:
        pytest.skip("no compiled kernels")
    emulates = found.newest >= native.Isa.AVX512VNNI
    for isa in found.built:
        if isa <= found.newest or (isa is native.Isa.AMX_EMULATED and emulates):
            with native.capped(isa):
                native.run_limits(None, 3, 2, dtype)
                assert native.limit_kernel() == f"limits_{isa.name.lower()}"


def test_without_compiled_kernels_integers_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = native.Native(None, "it was not built", None, ())
    monkeypatch.setattr(native, "load", lambda: absent)
    found = roofline.measure(**QUICK)
    assert found.kernel is None
    assert all(at.integer is None and at.float32 > 0 for at in found.limits)
    assert all(rate > 0 for at in found.limits for _, rate in at.reads)
    shown = machine_table(found).text()
    assert "no compiled kernels" in shown


@pytest.mark.skipif(native.load().why is not None, reason="no compiled kernels")
def test_lines_to_read_are_checked() -> None:
    data = torch.zeros(256, dtype=torch.uint8)
    first = data[-data.data_ptr() % 64 :]
    native.run_limits(first, 1)
    with pytest.raises(BadInput, match="too short"):
        native.run_limits(first, 5)
    with pytest.raises(BadInput, match="aligned"):
        native.run_limits(first[1:], 1)


def test_bandwidth_between_measured_sizes() -> None:
    assert MADE_UP.bandwidth(1) == 64
    assert MADE_UP.bandwidth(2**15) == pytest.approx(48)
    assert MADE_UP.bandwidth(2**30) == 32
    assert MADE_UP.peak("float64") is None


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(BadInput, match="seconds=0"):
        roofline.measure(seconds=0)
    with pytest.raises(BadInput, match="bytes are read"):
        roofline.measure(largest=10)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("llama", None), ("gpt2", None), ("qwen2", None), ("llama", "w8a8"), ("gpt2", "w4a16-g64")],
)
def test_products_of_a_model(name: str, recipe: str | None) -> None:
    model = specimen(name).build(0).to(torch.float32).eval()
    ids = torch.arange(6).reshape(1, 6)
    if recipe is not None:
        qpass.quantize(model, recipe, inputs=ids)
    found = measure_products(lambda: model(ids, use_cache=False), MADE_UP, seconds=0.001)
    hidden = model.config.hidden_size
    heads = [p for p in found if p.outputs == model.config.vocab_size]
    assert heads
    assert heads[0].inputs == hidden
    assert heads[0].tokens == 6
    kinds = {p.kind for p in found}
    assert kinds == {None: {"float32"}, "w8a8": {"int8"}}.get(recipe, kinds)
    for p in found:
        assert p.fraction > 0
        assert p.gigabytes == pytest.approx(p.bytes / p.microseconds / 1e3)
        assert p.teraoperations == pytest.approx(p.operations / p.microseconds / 1e6)
    # the longest come first, and the same layers of a model are one product
    assert [p.count * p.microseconds for p in found] == sorted(
        (p.count * p.microseconds for p in found), reverse=True
    )
    assert max(p.count for p in found) >= model.config.num_hidden_layers


def test_what_the_limits_allow() -> None:
    weight = torch.ones(64, 32)
    found = measure_products(lambda: torch.ones(1, 32) @ weight.T, MADE_UP, seconds=0.001)
    assert [(p.inputs, p.outputs, p.bytes, p.count) for p in found] == [(32, 64, 8192, 1)]
    reading = 8192 / MADE_UP.bandwidth(8192) / 1e9
    assert allowed(found, MADE_UP) == pytest.approx(reading)
    many = measure_products(lambda: torch.ones(4096, 32) @ weight.T, MADE_UP, seconds=0.001)
    assert allowed(many, MADE_UP) == pytest.approx(2 * 4096 * 32 * 64 / 2e12)
    wide = measure_products(
        lambda: torch.ones(1, 32, dtype=torch.float64) @ weight.T.double(), MADE_UP, seconds=0.001
    )
    assert allowed(wide, MADE_UP) is None
    assert wide[0].fraction is None
