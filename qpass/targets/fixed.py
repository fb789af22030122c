"""What modules of qpass's operators have in common: tensors whose types are not cast."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.runtime import gpu, native
from qpass.targets.tensors import Shapes


class Fixed(nn.Module):
    """A module of qpass's operators, whose buffers keep their types when it is cast."""

    def __init__(self) -> None:
        super().__init__()
        # the operators run on plain PyTorch until somebody loads the kernels
        native.load()
        gpu.register()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Quantized(Fixed, abc.ABC):
    """Integers and scales: packed in memory, in the form of checkpoints in the state dict."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise BadInput(f"a layer computes in a floating type, not {dtype}")
        self.dtype = dtype

    @abc.abstractmethod
    def canonical(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""

    @abc.abstractmethod
    def expected(self) -> Shapes:
        """The shape and type of each canonical tensor."""

    @abc.abstractmethod
    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy canonical tensors of the expected shapes and types."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # what a cast does change is the type that the layer computes in
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = {prefix + name: found for name, found in self.expected().items()}
        missing = [key for key in expected if key not in state_dict]
        missing_keys += missing
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in expected]
        wrong: list[str] = []
        for key, (shape, dtype) in expected.items():
            given = state_dict.get(key)
            if given is not None and (tuple(given.shape), given.dtype) != (shape, dtype):
                found = f"{given.dtype} {tuple(given.shape)}"
                wrong.append(f"{key} is {found}, expected {dtype} {shape}")
        error_msgs += wrong
        if not missing and not wrong:
            self.adopt({key.removeprefix(prefix): state_dict[key] for key in expected})
