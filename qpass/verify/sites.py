"""How far the output of each replaced module is from the reference's."""

# t positions, n features

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpass.ir import Step
from qpass.verify.scores import SiteError

# positions of a window whose outputs are kept, evenly spaced from the first: all sites of a large
# model on a long window would not fit in memory
POSITIONS = 64


def replaced(model: nn.Module, reference: nn.Module) -> tuple[str, ...]:
    """The innermost modules of `model` whose class is not that of `reference` at the same path."""
    originals = dict(reference.named_modules())
    paths = [
        path
        for path, module in model.named_modules()
        if path in originals and type(module) is not type(originals[path])
    ]
    return tuple(p for p in paths if not any(o != p and o.startswith(_prefix(p)) for o in paths))


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


@final
class Taps:
    """Keeps a sample of what the modules at some paths returned in their last call."""

    def __init__(self, paths: tuple[str, ...], real_bt: Tensor | None) -> None:
        self.paths = paths
        self.outputs: dict[str, Tensor | str] = {}
        self._real_bt = real_bt

    @contextmanager
    def on(self, model: nn.Module) -> Generator[None]:
        """While open, calls of `model` are recorded."""
        with ExitStack() as stack:
            for path in self.paths:
                handle = self._hook(model.get_submodule(path), path)
                stack.callback(handle.remove)
            yield

    def _hook(self, module: nn.Module, path: str) -> RemovableHandle:
        def keep(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2:
                self.outputs[path] = _sample(output.detach(), self._real_bt)
            else:
                self.outputs[path] = f"returns {type(output).__name__}, not features"

        return module.register_forward_hook(keep)


def _sample(output: Tensor, real_bt: Tensor | None) -> Tensor:
    """`[t, n]`: evenly spaced positions of each window, without padding."""
    b = output.shape[0]
    windows = output.reshape(b, -1, output.shape[-1])
    stride = max(1, -(-windows.shape[1] // POSITIONS))
    sampled = windows[:, ::stride]
    if real_bt is not None and real_bt.shape == windows.shape[:2]:
        return sampled[real_bt.to(sampled.device)[:, ::stride]].clone()
    return sampled.reshape(-1, output.shape[-1]).clone()


@final
class SiteErrors:
    """Adds up, window after window, the squared error of each site and of its reference.

    `bases` says how the model changed the basis of a module's output, as steps on the last axis;
    the reference's output is taken to that basis before it is compared.
    """

    def __init__(self, paths: tuple[str, ...], bases: Mapping[str, tuple[Step, ...]]) -> None:
        self._bases = bases
        self._error = dict.fromkeys(paths, 0.0)
        self._norm = dict.fromkeys(paths, 0.0)
        self._why: dict[str, str] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._error)

    def add(self, model: Taps, reference: Taps) -> None:
        for path in self._error:
            one, other = model.outputs.get(path), reference.outputs.get(path)
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                self._compare(path, one.double(), other.double())
            else:
                reasons = [why for why in (one, other) if isinstance(why, str)]
                self._why[path] = reasons[0] if reasons else "was not called as a module"

    def _compare(self, path: str, one_tn: Tensor, other_tn: Tensor) -> None:
        if one_tn.shape != other_tn.shape:
            self._why[path] = f"returns {list(one_tn.shape)} for {list(other_tn.shape)}"
            return
        for step in self._bases.get(path, ()):
            other_tn = step.apply(other_tn, {})
        self._error[path] += float((one_tn - other_tn).square().sum())
        self._norm[path] += float(other_tn.square().sum())

    def results(self) -> tuple[SiteError, ...]:
        return tuple(self._result(path) for path in self._error)

    def _result(self, path: str) -> SiteError:
        if path in self._why:
            return SiteError(path, None, self._why[path])
        if not self._norm[path] > 0:
            return SiteError(path, None, "the reference's output is zero")
        return SiteError(path, (self._error[path] / self._norm[path]) ** 0.5)


@runtime_checkable
class Described(Protocol):
    """A module that knows what it saves without making it."""

    def expected(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and type of each tensor of its state."""
        ...


def state_megabytes(module: nn.Module) -> float:
    """The state of `module` in 10^6 bytes, tensors that share memory counted once."""
    seen: dict[tuple[int, int], int] = {}
    total = 0
    for part in module.modules():
        if isinstance(part, Described):
            total += sum(prod(shape) * dtype.itemsize for shape, dtype in part.expected().values())
            continue
        unsaved = part._non_persistent_buffers_set
        buffers = [buffer for name, buffer in part._buffers.items() if name not in unsaved]
        for value in (*part._parameters.values(), *buffers):
            if value is not None:
                seen[value.data_ptr(), value.nbytes] = value.nbytes
    return (total + sum(seen.values())) / 1e6
