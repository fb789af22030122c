"""How fast models read a prompt and write tokens, side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from qpass.errors import BadInput
from qpass.runtime.products import Product, measure_products
from qpass.runtime.roofline import Limits


class Reader(Protocol):
    """A model that reads one sequence and says which token is the likeliest to come next."""

    def forget(self) -> None:
        """Begin another sequence."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """Read `tokens [1, t]`; the next one, `[1, 1]`."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, medians over repetitions: of a prompt, and one by one after it.

    `written` are the tokens of the greedy continuation that the decode was timed on.
    """

    prefill: float
    decode: float
    written: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class _Run:
    prefill: float  # seconds
    decode: float  # seconds for each token
    written: tuple[int, ...]


def measure(
    models: Mapping[str, PreTrainedModel | Reader],
    prompt: Tensor,
    *,
    new_tokens: int,
    repetitions: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Speed]:
    """Time causal language models on `prompt [1, t]`, models of torch with a static cache.

    Tokens are greedy, and only the last position's logits are computed in the prefill. A first,
    untimed repetition pays for compilation; then the models take turns, so that a disturbance meets
    all of them.
    """
    if prompt.dim() != 2 or len(prompt) != 1 or prompt.shape[1] < 1:
        raise BadInput(f"a prompt is one row of tokens, got shape {list(prompt.shape)}")
    if new_tokens < 1 or repetitions < 1:
        raise BadInput(
            f"{new_tokens} new tokens and {repetitions} repetitions; both are at least 1"
        )
    total = (repetitions + 1) * len(models)
    runs: dict[str, list[_Run]] = {name: [] for name in models}
    with torch.no_grad():
        readers = {
            name: _Own(model, prompt, new_tokens) if isinstance(model, PreTrainedModel) else model
            for name, model in models.items()
        }
        for repetition in range(repetitions + 1):
            for at, (name, reader) in enumerate(readers.items()):
                progress("compile and time", repetition * len(models) + at, total)
                runs[name].append(_run(reader, prompt, new_tokens))
    progress("compile and time", total, total)
    return {name: _median(taken[1:], prompt.shape[1]) for name, taken in runs.items()}


def products(
    model: PreTrainedModel, length: int, limits: Limits, *, seconds: float
) -> tuple[Product, ...]:
    """What an eager model multiplies to read `length` tokens and score the last, and how fast."""
    ids = random_prompt([model], length)
    return measure_products(
        lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), limits, seconds=seconds
    )


def float_models(
    models: Mapping[str, PreTrainedModel], found: Mapping[str, Mapping[int, Sequence[Product]]]
) -> dict[str, PreTrainedModel]:
    """The models that multiply floats alone; BadInput if there is none.

    `found` are the products of the models, by the number of tokens they read.
    """
    names = [
        name
        for name, several in found.items()
        if not any(p.operator.startswith("qpass") for length in several.values() for p in length)
    ]
    if not names:
        raise BadInput(
            f"{', '.join(models)} is quantized, so there is no float model to compare with\n"
            "  name it with --reference"
        )
    return {name: models[name] for name in names}


def in_bfloat16(models: Mapping[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """A copy in bfloat16 of each model."""
    copies = {name: recast(model, torch.bfloat16) for name, model in models.items()}
    return {f"{name} in bfloat16": copied for name, copied in copies.items()}


def recast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model in another floating type."""
    copied = copy.deepcopy(model)
    # as transformers declares its own `to`, nobody may call it
    nn.Module.to(copied, dtype)
    return copied


def causal(name: str, model: nn.Module) -> PreTrainedModel:
    """`model` as one that can be timed; BadInput, with the name, for any other."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise BadInput(f"{name} is a {type(model).__name__}, which does not write tokens")
    return model


def random_prompt(models: Iterable[PreTrainedModel], length: int) -> Tensor:
    """`[1, length]` tokens that all of `models` know, the same on every call."""
    tables = [model.get_input_embeddings() for model in models]
    known = min(int(cast("nn.Embedding", table).num_embeddings) for table in tables)
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randint(known, (1, length), generator=generator, device="cpu")


@final
class _Own:
    """A model of torch with a static cache."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> None:
        config = model.config.get_text_config(decoder=True)
        self._model = model
        self._room = StaticCache(config=config, max_cache_len=prompt.shape[1] + new_tokens)
        # one eager step allocates it: a graph that does so returns it, and is compiled twice
        model.forward(input_ids=prompt[:, :1], past_key_values=self._room, use_cache=True)

    def forget(self) -> None:
        self._room.reset()

    def next(self, tokens: Tensor) -> Tensor:
        given = {"past_key_values": self._room, "use_cache": True, "logits_to_keep": 1}
        return self._model(input_ids=tokens, **given).logits[:, -1].argmax(-1, keepdim=True)


def _run(reader: Reader, prompt: Tensor, new_tokens: int) -> _Run:
    reader.forget()
    start = time.perf_counter()
    token = reader.next(prompt)
    read = time.perf_counter()
    written = [token]
    for _ in range(new_tokens):
        token = reader.next(token)
        written.append(token)
    done = time.perf_counter()
    return _Run(read - start, (done - read) / new_tokens, tuple(int(t) for t in written))


def _median(runs: list[_Run], length: int) -> Speed:
    return Speed(
        prefill=length / statistics.median(run.prefill for run in runs),
        decode=1 / statistics.median(run.decode for run in runs),
        written=runs[-1].written,
    )
