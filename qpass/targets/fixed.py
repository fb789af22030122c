"""What modules of qpass's operators have in common: tensors whose types are not cast."""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.runtime import gpu, native
from qpass.targets.tensors import LINES, Shapes

# whether state dicts are asked what the tensors of a file are like, and not for values
_DESCRIBED = ContextVar("described", default=False)


@contextmanager
def described() -> Generator[None]:
    """While open, state dicts name what a file stores, on the meta device where it is made."""
    token = _DESCRIBED.set(True)
    try:
        yield
    finally:
        _DESCRIBED.reset(token)


def made_with(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensor of a file that is only described, with those that its module makes too."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if not isinstance(module, Quantized):
        raise BadInput(f"{name}: is on the meta device and holds no values; load the model first")
    prefix = f"{path}." if path else ""
    return {prefix + own: tensor for own, tensor in module.stored().items()}


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
    """Integers and scales: packed in memory and in files, row by row in the state dict."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise BadInput(f"a layer computes in a floating type, not {dtype}")
        self.dtype = dtype

    @abc.abstractmethod
    def canonical(self) -> dict[str, Tensor]:
        """The tensors of the state dict, by name: copies of the layer's, or its own."""

    @abc.abstractmethod
    def expected(self) -> Shapes:
        """The shape and type of each canonical tensor."""

    @abc.abstractmethod
    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy canonical or stored tensors of the expected shapes and types."""

    def stored(self) -> dict[str, Tensor]:
        """The tensors of a file, by name."""
        return self.canonical()

    def stored_shapes(self) -> Shapes:
        """The shape and type of each stored tensor."""
        return self.expected()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # what a cast does change is the type that the layer computes in
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if _DESCRIBED.get():
            made = {
                n: torch.empty(s, dtype=d, device="meta")
                for n, (s, d) in self.stored_shapes().items()
            }
        else:
            made = self.canonical()
        for name, tensor in made.items():
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
        shapes = self.stored_shapes() if prefix + LINES in state_dict else self.expected()
        expected = {prefix + name: found for name, found in shapes.items()}
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
