"""What an engine is: something that reads tokens of a model that it has in a form of its own."""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib.util
import inspect
import io
import tempfile
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qpass.capture.hush import hushed
from qpass.errors import BadInput
from qpass.hf.pretrained import GGUF
from qpass.hf.speed import Reader, recast
from qpass.registry import Registry

# what exported caches are called
PAST, PRESENT = "past_key_values.", "present."
# of what scores how many tokens at the end
LAST_ONLY = "logits_to_keep"


@final
@dataclass(frozen=True, eq=False)
class Source:
    """A float model, the name it was read from, and a folder for files made of it.

    Sequences have at most `room` tokens.
    """

    name: str
    model: PreTrainedModel
    folder: Path
    room: int
    threads: int

    @functools.cached_property
    def onnx(self) -> Path:
        """The model in float32, as `export_onnx` writes it; a cache is inputs and outputs.

        Only the last token is scored, as everybody else does it.
        """
        import onnx

        from qpass.export import export_onnx

        model = recast(self.model, torch.float32)
        if LAST_ONLY in inspect.signature(model.forward).parameters:
            model.forward = functools.partial(model.forward, **{LAST_ONLY: 1})
        path = self.folder / "model.onnx"
        export_onnx(model, None, path, verify=False)
        graph = onnx.load(str(path), load_external_data=False).graph
        if not any(given.name.startswith(PAST) for given in graph.input):
            raise BadInput("it has no cache of keys and values to export")
        return path

    @property
    def gguf(self) -> Path | None:
        """The file that the model was read from, if it is of llama.cpp's format."""
        path = Path(self.name)
        return path if path.suffix == GGUF else None


class Engine(abc.ABC):
    """An engine, and the modules that it needs."""

    name: str
    needs: tuple[str, ...]

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) is not None for module in self.needs)

    @abc.abstractmethod
    def open(self, source: Source) -> Reader | None:
        """The model in this engine; None if there is no way from the model to it."""


def feeds(tokens: Tensor, read: int, names: Collection[str]) -> dict[str, Any]:
    """What an exported graph is given of `tokens [1, t]` behind `read` others, but its cache.

    Only what is among the `names` of its inputs.
    """
    total = read + tokens.shape[1]
    given = {
        "input_ids": tokens.numpy(),
        "attention_mask": np.ones((1, total), dtype=np.int64),
        "position_ids": np.arange(read, total, dtype=np.int64)[None],
    }
    return {name: value for name, value in given.items() if name in names}


ENGINES: Registry[Engine] = Registry("engine", "qpass.engines")


@contextlib.contextmanager
def opened(
    models: Mapping[str, PreTrainedModel], *, room: int, threads: int
) -> Generator[tuple[dict[str, Reader], dict[str, str]]]:
    """Every float model in every engine that is installed and can read it, while this lasts.

    The others come second, by the same names, with the reason.
    """
    found: dict[str, Reader] = {}
    left: dict[str, str] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for at, (name, model) in enumerate(models.items()):
            own = Path(folder) / str(at)
            own.mkdir()
            source = Source(name, model, own, room, threads)
            for engine in ENGINES:
                reader = _tried(engine, source)
                called = f"{name} in {engine.name}"
                if isinstance(reader, str):
                    left[called] = reader
                else:
                    found[called] = reader
        yield found, left


def _tried(engine: Engine, source: Source) -> Reader | str:
    """A model in an engine, or why it is not there."""
    if not engine.installed:
        return f"{', '.join(engine.needs)}: not installed"
    try:
        # nobody else writes to what may be one document
        with hushed(), contextlib.redirect_stdout(io.StringIO()):
            reader = engine.open(source)
    except Exception as error:  # noqa: BLE001  whatever another library raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return "it does not read such a file" if reader is None else reader
