"""llama.cpp: a GGUF file as it is."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from qpass.engines.base import ENGINES, Engine, Source

# tokens that it reads at once
BATCH = 512


@final
class LlamaCpp(Engine):
    """It reads no other files, so models of other formats are left out."""

    name = "llama.cpp"
    needs = ("llama_cpp",)

    def open(self, source: Source) -> Context | None:
        return None if source.gguf is None else Context(source)


@final
class Context:
    """A context with one sequence."""

    def __init__(self, source: Source) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._library: Any = llama_cpp
        self._model: Any = llama_cpp.Llama(
            str(source.gguf), n_ctx=source.room, n_batch=BATCH,
            n_threads=source.threads, n_threads_batch=source.threads, verbose=False,
        )  # fmt: skip

    def forget(self) -> None:
        """Begin another sequence."""
        self._model.reset()
        memory = self._library.llama_get_memory(self._model.ctx)
        self._library.llama_memory_clear(memory, True)

    def next(self, tokens: Tensor) -> Tensor:
        """Read `tokens [1, t]`; the likeliest that comes next, `[1, 1]`."""
        self._model.eval(tokens[0].tolist())
        logits = self._library.llama_get_logits_ith(self._model.ctx, -1)
        scores = np.ctypeslib.as_array(logits, (self._model.n_vocab(),))
        return torch.tensor([[int(scores.argmax())]], device="cpu")


ENGINES.add(LlamaCpp())
