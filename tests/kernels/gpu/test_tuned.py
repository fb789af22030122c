"""Do tables of measured configurations say how kernels are launched, and does bad input not?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from qpass.errors import BadInput
from qpass.runtime import tuned
from qpass.runtime.gpu import KERNELS, Call, Kernel
from qpass.runtime.target import TARGETS, target
from qpass.runtime.tuned import Table, configuration, tune, use
from tests.kernels.gpu.test_choice import CALLS, drawn

TUNED = [kernel for kernel in KERNELS if kernel.tuning is not None]


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    use(None)
    yield
    use(None)


def served(kernel: Kernel, on: str = "sm_90") -> list[Call]:
    """Calls that a kernel accepts, on one target; the tensors are meta."""
    calls = (drawn(seed) for seed in range(4 * CALLS))
    there = (Call(c.operator, c.arguments, target(on)) for c in calls)
    return [c for c in there if c.operator == kernel.operator and kernel.accepts(c) is None]


def chosen(kernel: Kernel, call: Call) -> Any:
    assert kernel.tuning is not None
    return configuration(kernel.name, kernel.tuning, call)


@pytest.mark.parametrize("kernel", TUNED, ids=lambda kernel: kernel.name)
def test_the_fastest_of_a_clock_is_chosen(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = served(kernel)
    if not calls:
        pytest.skip("no random call is served by it")
    assert kernel.tuning is not None
    # a call that its model serves in another way than the last of the candidates
    call = next(c for c in calls if kernel.tuning.candidates(c))
    *_, last = kernel.tuning.candidates(call)
    assert chosen(kernel, call) != last
    table = tune("a GPU", [(kernel, call)], lambda _k, _c, one: 1.0 if one == last else 2.0)
    table.save(tmp_path / "table.json")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    use(None)
    assert chosen(kernel, call) == last
    # what was measured on one kind of GPU says nothing of others
    other = Call(call.operator, call.arguments, target("sm_120"))
    usual = kernel.tuning.choose(other)
    assert chosen(kernel, other) == usual
    use(Table("sm_90", "a GPU"))
    assert chosen(kernel, call) == kernel.tuning.choose(call)


def test_configurations_that_fail_or_are_none_are_passed_over() -> None:
    kernel = KERNELS["linear_real_vector"]
    assert kernel.tuning is not None
    call = next(c for c in served(kernel) if kernel.tuning.candidates(c))
    first, second, *_ = kernel.tuning.candidates(call)
    table = tune("a GPU", [(kernel, call)], lambda _k, _c, one: 3.0 if one == second else None)
    use(table)
    assert chosen(kernel, call) == second
    assert tune("a GPU", [(kernel, call)], lambda *_: None).fastest == {}
    key = kernel.tuning.key(call)
    use(Table("sm_90", "a GPU", {kernel.name: {key: {"outputs": 3, "lines": 5}}}))
    assert chosen(kernel, call) == kernel.tuning.choose(call)
    assert first != second


@pytest.mark.parametrize("kernel", TUNED, ids=lambda kernel: kernel.name)
def test_a_choice_depends_on_the_key_alone(kernel: Kernel) -> None:
    assert kernel.tuning is not None
    by_key: dict[tuple[str, str], Any] = {}
    for on in TARGETS:
        for call in served(kernel, on.name):
            key = (on.name, kernel.tuning.key(call))
            assert by_key.setdefault(key, kernel.tuning.choose(call)) == kernel.tuning.choose(call)


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    one = Table("sm_90", "a GPU", {"k": {"1 x 2": {"lines": 4, "ahead": True}}})
    two = Table("sm_90", "a GPU", {"k": {"2 x 2": {"lines": 8}}, "l": {}})
    one.save(tmp_path / "one.json")
    assert Table.load(tmp_path / "one.json") == one
    both = one.joined(two)
    assert both.fastest == {
        "k": {"1 x 2": {"lines": 4, "ahead": True}, "2 x 2": {"lines": 8}},
        "l": {},
    }


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"version": 0}', '{"version": 1, "target": "sm_90"}',
             '{"version": 1, "target": "sm_90", "gpu": "", "fastest": {"k": 1}}'],
)  # fmt: skip
def test_what_is_no_table_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"table\.json"):
        Table.load(path)
