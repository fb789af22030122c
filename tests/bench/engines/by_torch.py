"""PyTorch: the float model, compiled by inductor, or quantized by torchao."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from tests.bench.engines.worker import Prompts, Setting, main

# the checkpoint's own type where it is not said
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8 dynamic": torch.bfloat16,
}
# nobody changes the modules here
OPTIONS: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}


class Torch:
    """Prompts of one length are read at once, others token by token: nothing else is compiled."""

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        self._model, self._prompt = model, setting.prompt
        config = model.config.get_text_config(decoder=True)
        self._cache = StaticCache(config=config, max_cache_len=setting.room)
        # one eager step allocates it: a graph that does so is compiled twice
        with torch.no_grad():
            model.forward(
                input_ids=torch.zeros(setting.batch, 1, dtype=torch.long),
                past_key_values=self._cache, use_cache=True,
            )  # fmt: skip

    def prefill(self, prompts: Prompts) -> np.ndarray:
        self._cache.reset()
        if len(prompts[0]) == self._prompt:
            return self._next(torch.tensor(prompts))
        return [self.step(tokens) for tokens in zip(*prompts, strict=True)][-1]

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        return self._next(torch.tensor(tokens).unsqueeze(1))

    @torch.no_grad()
    def _next(self, ids: Tensor) -> np.ndarray:
        found = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return found.logits[:, -1].float().numpy()


def load(variant: str, path: Path, setting: Setting) -> Torch:
    torch.set_num_threads(setting.threads)
    dtype = DTYPES.get(variant, "auto")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if variant == "int8 dynamic":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    engine = Torch(model, setting)
    if variant != "float32":
        model.compile(options=OPTIONS, dynamic=False)
    return engine


def convert(variant: str, checkpoint: Path, out: Path) -> None:
    """It reads checkpoints as they are."""
    out.symlink_to(checkpoint.resolve())


if __name__ == "__main__":
    main(load, convert)
