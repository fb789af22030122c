"""Is a model on a GPU worked on on the CPU, and does it go back?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qpass.capture.elsewhere import on_cpu, to_cpu


def held(device: str) -> nn.Module:
    """A module with a buffer on a device that need not be there."""
    made = nn.Module()
    made.register_buffer("kept", torch.empty(2, device=device))
    return made


def devices(model: nn.Module) -> set[str]:
    return {p.device.type for p in (*model.parameters(), *model.buffers())}


def test_a_model_goes_to_the_cpu_and_back_even_after_a_failure() -> None:
    with FakeTensorMode():
        model = nn.Sequential(held("cuda"), held("cuda"))
        found: list[set[str]] = []

        def fail() -> None:
            with on_cpu(model):
                found.append(devices(model))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert found == [{"cpu"}]
        assert devices(model) == {"cuda"}


def test_other_models_stay_where_they_are() -> None:
    with FakeTensorMode():
        mixed = nn.Sequential(held("cuda"), held("cpu"))
        with on_cpu(mixed):
            assert devices(mixed) == {"cuda", "cpu"}
    model = nn.Linear(2, 2)
    weight = model.weight
    with on_cpu(model):
        assert model.weight is weight


def test_inputs_follow_at_any_depth() -> None:
    with FakeTensorMode():
        x = torch.ones(2, device="cuda")
        moved = to_cpu({"ids": x, "rest": (x, [1, None])})
        assert moved["ids"].device.type == moved["rest"][0].device.type == "cpu"
        assert moved["rest"][1] == [1, None]
    given = torch.ones(2)
    assert to_cpu((given,))[0] is given
