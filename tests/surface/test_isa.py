"""Does a compiled graph use the instruction set that its options name, and nothing else change?"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import qpass.backend
from qpass.errors import BadInput, UnknownName, Unsupported
from qpass.runtime import native
from qpass.runtime.native import Isa
from tests.kernels.cases import paths, random_packed

pytestmark = pytest.mark.skipif(not paths(), reason=str(native.load().why))

INPUT = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
NAMES = [name for name, isa in native.NAMES.items() if isa in paths()]


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    def run_graph(graph, inputs, config_patches=None):
        return graph

    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", run_graph)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """A layer to quantize."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def serving() -> str:
    packed = random_packed(32, 64, 2, (8, False, False), torch.Generator().manual_seed(1))
    return native.explain_linear(64, packed, torch.float32, integer_activations=True).kernel


def compiled(monkeypatch: pytest.MonkeyPatch, seen: list[str], **options: object) -> nn.Module:
    """A model whose graph tells, each time it runs, which kernel serves its thread."""

    def run_graph(graph, inputs, config_patches=None):
        def run(*arguments):
            seen.append(serving())
            return graph(*arguments)

        return run

    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", run_graph)
    model = Layer().eval()
    model.compile(backend="qpass", options={"recipe": "w8a8", **options})
    with torch.no_grad():
        model(INPUT)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_of_a_graph_use_the_set_that_is_named(name, monkeypatch):
    seen: list[str] = []
    before = serving()
    model, plain = compiled(monkeypatch, seen, isa=name), compiled(monkeypatch, seen)
    seen.clear()
    with torch.no_grad():
        got, want = model(INPUT), plain(INPUT)
    expected = f"linear_codes_{native.NAMES[name].name.lower()}"
    assert seen == [expected, before]
    assert serving() == before
    assert torch.equal(got, want)


def test_two_threads_with_sets_of_their_own_do_not_meet(monkeypatch):
    seen: dict[str, list[str]] = {"portable": [], "avx2": []}
    models = {name: compiled(monkeypatch, seen[name], isa=name) for name in seen}

    def work(name: str) -> None:
        with torch.no_grad():
            for _ in range(50):
                models[name](INPUT)

    threads = [threading.Thread(target=work, args=(name,)) for name in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, kernels in seen.items():
        assert set(kernels) == {f"linear_codes_{name}"}
        assert len(kernels) == 51


def test_a_call_that_fails_leaves_no_limit_behind():
    before = serving()

    def fail() -> None:
        assert serving() == "linear_codes_portable"
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        native.limited(fail, Isa.PORTABLE)()
    assert serving() == before


@pytest.mark.parametrize(
    ("isa", "kind", "says"),
    [
        ("vnnni", UnknownName, "did you mean 'vnni'"),
        ("AVX2", UnknownName, "known: amx"),
        (2, BadInput, "isa = 2"),
    ],
)
def test_a_name_that_is_none_is_refused(isa, kind, says):
    model = Layer().eval()
    model.compile(backend="qpass", options={"recipe": "w8a8", "isa": isa})
    with pytest.raises(kind, match=says), torch.no_grad():
        model(torch.randn(3, 64))


def test_a_set_that_the_machine_lacks_is_refused(monkeypatch):
    found = native.Native(None, None, Isa.AVX2, tuple(Isa))
    monkeypatch.setattr(native, "load", lambda: found)
    for name in ("amx", "vnni", "amx_emulated"):
        with pytest.raises(Unsupported, match="lacks it\n  choose among portable, avx2"):
            native.named(name)
    assert native.named("avx2") is Isa.AVX2
    monkeypatch.setattr(native, "load", lambda: native.Native(None, "none here", None, ()))
    with pytest.raises(Unsupported, match="none here"):
        native.named("portable")


@pytest.mark.parametrize("name", ["avx2", "sse"])
def test_the_environment_may_name_one_for_the_process(name):
    program = "from tests.surface.test_isa import serving; print(serving())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, native.VARIABLE: name},
        capture_output=True,
        text=True,
    )
    if name == "avx2":
        assert done.stdout.strip() == "linear_codes_avx2"
    else:
        assert "no instruction set named 'sse'" in done.stderr
