"""Which device does a graph run on, and what is refused?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qpass.errors import Unsupported
from qpass.runtime.device import graph_device


@pytest.fixture(autouse=True)
def fakes() -> Iterator[None]:
    """Tensors are on devices that need not be there."""
    with FakeTensorMode():
        yield


def test_tensors_on_one_device_run_there() -> None:
    assert graph_device([torch.ones(2), 3]) == torch.device("cpu")
    assert graph_device([torch.ones(2, device="cuda"), None]) == torch.device("cuda:0")
    assert graph_device([]) == torch.device("cpu")


def test_numbers_on_the_cpu_go_anywhere() -> None:
    assert graph_device([torch.ones(()), torch.ones(2, device="cuda:1")]).index == 1


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (("cuda:0", "cuda:1"), "cuda:0, cuda:1"),
        (("cpu", "cuda:0"), "cuda:0 and cpu"),
        (("xpu",), "xpu"),
    ],
)
def test_other_devices_are_refused_by_name(devices: tuple[str, ...], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        graph_device([torch.ones(2, device=device) for device in devices])
