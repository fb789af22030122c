"""Is a weight prepared once, again when it changes, and freed with its tensor?"""

import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qpass.errors import StateError
from qpass.ir import Ones, ScaleAxis, Weight
from qpass.runtime.packs import AsFloat, depends_on, prepared
from qpass.runtime.values import free, is_freed, state

FORM = AsFloat(torch.float32)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def scaled() -> Weight:
    return Weight("w").then(ScaleAxis(Weight("g"), 1))


def test_made_once_under_any_name():
    w, g = parameter(3, 4), parameter(4)
    (first,) = prepared(scaled(), FORM, {"w": w, "g": g})
    other = Weight("a.w").then(ScaleAxis(Weight("a.g"), 1))
    (second,) = prepared(other, FORM, {"a.w": w, "a.g": g})
    assert first is second
    assert torch.equal(first, w * g)
    (third,) = prepared(scaled(), FORM, {"w": parameter(3, 4), "g": g})
    assert third is not first


@pytest.mark.parametrize("changed", ["w", "g"])
def test_made_again_after_a_change_in_place(changed):
    sources = {"w": parameter(3, 4), "g": parameter(4)}
    (first,) = prepared(scaled(), FORM, sources)
    with torch.no_grad():
        sources[changed].mul_(2)
    (second,) = prepared(scaled(), FORM, sources)
    assert torch.equal(second, 2 * first)


def test_made_again_after_data_is_replaced():
    w = parameter(2, 2)
    prepared(Weight("w"), FORM, {"w": w})
    w.data = torch.ones(2, 2)
    (second,) = prepared(Weight("w"), FORM, {"w": w})
    assert torch.equal(second, torch.ones(2, 2))


def test_freed_with_its_tensor():
    w = parameter(3, 4)
    alive = weakref.ref(prepared(Weight("w"), AsFloat(torch.float64), {"w": w})[0])
    assert alive() is not None
    del w
    gc.collect()
    assert alive() is None


def test_weights_made_from_nothing_are_shared():
    weight = Weight(None, (Ones((5,)),))
    assert prepared(weight, FORM, {})[0] is prepared(weight, FORM, {"w": parameter(1)})[0]


def test_names_of_everything_a_weight_needs():
    nested = scaled().then(ScaleAxis(Weight("h").then(ScaleAxis(Weight("k"), 0)), 0))
    assert set(depends_on(nested)) == {"w", "g", "h", "k"}


def test_threads_make_it_once():
    w = parameter(64, 64)
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(prepared(Weight("w"), FORM, {"w": w})))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one is found[0] for one in found)


def test_freed_values_are_served_from_what_was_made():
    w = parameter(64, 64)
    before = state(w)
    (first,) = prepared(Weight("w"), FORM, {"w": w})
    kept = first.clone()
    free(w)
    assert is_freed(w)
    assert state(w) == before
    assert torch.equal(w, torch.zeros(64, 64))
    assert torch.equal(prepared(Weight("w"), FORM, {"w": w})[0], kept)
    with pytest.raises(StateError, match="freed"):
        prepared(Weight("w"), AsFloat(torch.float64), {"w": w})


def test_a_freed_tensor_that_is_written_again_counts():
    w = parameter(64, 64)
    free(w)
    with torch.no_grad():
        w.copy_(torch.ones(64, 64))
    assert not is_freed(w)
    assert torch.equal(prepared(Weight("w"), FORM, {"w": w})[0], torch.ones(64, 64))


def test_freeing_keeps_shape_strides_and_type():
    w = nn.Parameter(torch.randn(64, 96).bfloat16().T, requires_grad=False)
    free(w)
    assert (w.shape, w.stride(), w.dtype) == (torch.Size((96, 64)), (1, 96), torch.bfloat16)
    assert isinstance(w, nn.Parameter)


def test_inference_tensors_have_a_state():
    with torch.inference_mode():
        w = torch.ones(4)
    assert torch.equal(prepared(Weight("w"), FORM, {"w": w})[0], torch.ones(4))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_a_file_that_others_keep_mapped_are_given_back(tmp_path: Path) -> None:
    size = 64 * 2**20
    values = torch.arange(size // 4, dtype=torch.float32)
    save_file({"large": values, "small": torch.ones(5)}, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    other = found["large"].view(-1)
    assert float(found["large"].sum()) > 0
    before = resident()
    free(found["large"])
    assert before - resident() > 0.9 * size
    assert is_freed(found["large"])
    assert torch.equal(found["small"], torch.ones(5))
    # another view of the same memory reads the file again
    assert torch.equal(other, values)


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
