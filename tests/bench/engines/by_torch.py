"""PyTorch: the float model, compiled by inductor or by qpass, or quantized by torchao."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from tests.bench.engines.worker import main

PROMPT = 512
# the checkpoint's own type where it is not said
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8 dynamic": torch.bfloat16,
}


class Torch:
    """Prompts of one length are read at once, others token by token: nothing else is compiled."""

    def __init__(self, model: torch.nn.Module, room: int) -> None:
        self._model = model
        config = model.config.get_text_config(decoder=True)
        self._cache = StaticCache(config=config, max_cache_len=room)
        # one eager step allocates it: a graph that does so is compiled twice
        with torch.no_grad():
            model.forward(
                input_ids=torch.zeros(1, 1, dtype=torch.long),
                past_key_values=self._cache, use_cache=True,
            )  # fmt: skip

    def prefill(self, tokens: Sequence[int]) -> int:
        self._cache.reset()
        if len(tokens) == PROMPT:
            return self._next(torch.tensor([tokens]))
        return [self.step(token) for token in tokens][-1]

    def step(self, token: int) -> int:
        return self._next(torch.tensor([[token]]))

    @torch.no_grad()
    def _next(self, ids: Tensor) -> int:
        found = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return int(found.logits[0, -1].argmax())


def load(variant: str, path: Path, threads: int, room: int) -> Torch:
    torch.set_num_threads(threads)
    dtype = DTYPES.get(variant, "auto")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if variant == "int8 dynamic":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    engine = Torch(model, room)
    # nobody changes the modules here
    options: dict[str, Any] = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
    }
    if variant.startswith("qpass "):
        options |= {"recipe": variant.removeprefix("qpass "), "free_weights": True}
        model.compile(backend="qpass", options=options, dynamic=False)
    elif variant != "float32":
        model.compile(options=options, dynamic=False)
    return engine


def convert(variant: str, checkpoint: Path, out: Path) -> None:
    """It reads checkpoints as they are."""
    out.symlink_to(checkpoint.resolve())


if __name__ == "__main__":
    main(load, convert)
