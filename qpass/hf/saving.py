"""How a model that qpass changed answers `save_pretrained`: it writes what `qpass.save` does."""

from __future__ import annotations

import functools
from pathlib import Path

from torch import nn

from qpass.errors import BadInput, StateError
from qpass.hf.checkpoint import save

_SAVE = "save_pretrained"


def take_over_saving(model: nn.Module) -> None:
    """Let `save_pretrained` write the changes of `model`, which its config alone does not tell.

    A part of the model refuses: what it holds is in the basis of the whole.
    """
    for module in model.modules():
        if callable(getattr(module, _SAVE, None)):
            answer = _save_pretrained if module is model else _refuse
            vars(module)[_SAVE] = functools.partial(answer, module)


def _save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    max_shard_size: int | str | None = None,
    **others: object,
) -> None:
    """`qpass.save`, in shards of its own size."""
    del max_shard_size
    # their defaults ask for nothing
    harmless = {"save_peft_format", "save_original_format", "safe_serialization", "token"}
    asked = {name for name, value in others.items() if value not in (None, False)} - harmless
    if asked:
        raise BadInput(
            f"save_pretrained: {', '.join(sorted(asked))} cannot be had for a model that qpass "
            "changed\n  leave it out, or use qpass.save"
        )
    if is_main_process:
        save(model, save_directory)


def _refuse(module: nn.Module, *_: object, **__: object) -> None:
    raise StateError(
        f"{type(module).__name__} is a part of a model that qpass changed, and its weights are in "
        "the basis of the whole\n  save the whole model"
    )
