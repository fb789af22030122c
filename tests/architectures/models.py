"""A tiny random model of a type, with two calls that it takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, final

import torch
import transformers as hf
from torch import Tensor

from tests.architectures.catalogue import Architecture
from tests.architectures.inputs import Call, calls
from tests.architectures.shrink import VARIANTS, Variant, shrunk
from tests.zoo import randomise

LARGEST = 30_000_000


@final
class NoModel(Exception):
    """No tiny model of a type could be built and called."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, two calls of different shapes, and what it returned for them."""

    model: hf.PreTrainedModel
    first: Call
    second: Call
    outputs: tuple[list[Tensor], list[Tensor]]


def subject(of: Architecture) -> Subject:
    """The first variant that works, in float64 unless the model itself insists on less."""
    refusals: list[str] = []
    for variant in VARIANTS:
        for dtype in (torch.float64, torch.float32):
            for attention in ("sdpa", "eager"):
                try:
                    return _built(of, variant, attention, dtype)
                except NoModel:
                    raise
                except ImportError as error:
                    raise NoModel(_missing(error)) from error
                except Exception as error:  # noqa: BLE001  the model's code may raise anything
                    refusals.append(_said(error))
    told = [said for said in dict.fromkeys(refusals) if "attention implementation" not in said]
    raise NoModel(" | ".join(told)[:600])


def _missing(error: ImportError) -> str:
    wanted = re.search(r"requires the (\S+) library", str(error))
    return f"needs {wanted[1]}, which is not installed" if wanted else _said(error)


def _said(error: Exception) -> str:
    """What went wrong, without what a validation of a config puts around it."""
    said = re.sub(r"^Class validation error for validator '\w+':\s*", "", str(error))
    return f"{type(error).__name__}: {' '.join(said.split())[:140]}"


def called(model: hf.PreTrainedModel, call: Call, **more: object) -> Any:
    """What the model returns, without a cache where it has a choice."""
    with torch.no_grad():
        try:
            return model(**call, **more, use_cache=False)
        except TypeError:
            return model(**call, **more)


def outputs(model: hf.PreTrainedModel, call: Call) -> list[Tensor]:
    """All floating tensors that the model returns, caches aside."""
    result = called(model, call)
    values = [result] if isinstance(result, Tensor) else list(result.to_tuple())
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _built(of: Architecture, variant: Variant, attention: str, dtype: torch.dtype) -> Subject:
    kind = of.model_class()
    torch.manual_seed(0)
    config = shrunk(kind.config_class, variant)
    config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(p.numel() for p in kind._from_config(config).parameters())
    if size > LARGEST:
        raise NoModel(f"{size} parameters at the least")
    model = kind._from_config(config).double()
    randomise(model, 0)
    model = model.eval().to(dtype)
    error: Exception | None = None
    for first, second in zip(
        calls(model, batch=2, length=7, seed=0),
        calls(model, batch=3, length=9, seed=1),
        strict=True,
    ):
        try:
            return Subject(model, first, second, (outputs(model, first), outputs(model, second)))
        except Exception as said:  # noqa: BLE001  the model's code may raise anything
            error = error or said
    assert error is not None
    raise error
