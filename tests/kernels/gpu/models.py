"""Whole models on a real GPU: against the same model on the CPU, and against bfloat16."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qpass
import qpass.backend

Row = dict[str, Any]
# bfloat16 activations, summed and fused in another order, which moves some of their codes
BOUND = 0.06
# steps of 4-bit floats are coarse, and each code that moves is one
COARSE = {"mxfp4": 0.25, "nvfp4": 0.25}
# the layers of the model that decodes: fewer take the GPU less time than Python takes to ask
LAYERS = 4
RECIPE = "w4a16-g64"
GRAPHS = "reduce-overhead"
# asked for one after another, so that the GPU waits for nobody
TOKENS = 20


def model(width: int, inner: int, layers: int, vocabulary: int, heads: int) -> nn.Module:
    """A decoder with random weights and nothing left at a neutral value."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return made.eval().to(torch.bfloat16)


def logits(run: Callable[..., Any], tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return run(tokens, use_cache=False).logits


def apart(got: Tensor, want: Tensor) -> float:
    g, w = got.double().cpu(), want.double().cpu()
    return float((g - w).norm() / w.norm())


def _close(error: float, recipe: str) -> Row:
    bound = COARSE.get(recipe, BOUND)
    return {"error": error, "ok": error <= bound, "why": f"{error:.2e} apart, over {bound}"}


def compiled_by_qpass(built: nn.Module, recipe: str, mode: str | None) -> Callable[..., Any]:
    """The model through the backend, which need not be installed."""
    options = {"recipe": recipe}
    return torch.compile(
        built, backend=functools.partial(qpass.backend.backend, options=options, mode=mode)
    )


def agreement(recipe: str) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A small quantized model on the GPU, eager and compiled, against itself on the CPU."""
    small = model(256, 688, 2, 512, 8)
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    on_gpu = tokens.cuda()
    quantized = qpass.quantize(copy.deepcopy(small), recipe, inputs=tokens)
    want = logits(quantized, tokens)
    moved = copy.deepcopy(quantized).cuda()

    def eager() -> Row:
        return _close(apart(logits(moved, on_gpu), want), recipe)

    def made_there() -> Row:
        made = qpass.quantize(copy.deepcopy(small).cuda(), recipe, inputs=on_gpu)
        return _close(apart(logits(made, on_gpu), want), recipe)

    def compiled(mode: str) -> Row:
        torch._dynamo.reset()
        run = torch.compile(moved, mode=mode)
        # the first runs of a CUDA graph warm up and record, later ones replay
        found = [logits(run, on_gpu).clone() for _ in range(4)]
        return _close(max(apart(one, want) for one in found), recipe)

    def backend(mode: str) -> Row:
        torch._dynamo.reset()
        run = compiled_by_qpass(copy.deepcopy(small).cuda(), recipe, mode)
        found = [logits(run, on_gpu).clone() for _ in range(4)]
        exact = logits(small, tokens)
        # it rotates other edges than the module does, to about the same error
        error, most = max(apart(one, exact) for one in found), 1.5 * apart(want, exact)
        return {"error": error, "ok": error <= most, "why": f"{error:.2e} apart, over {most:.2e}"}

    yield f"{recipe} eager", eager
    yield f"{recipe} quantized on the GPU", made_there
    yield f"{recipe} backend, CUDA graphs", lambda: backend("reduce-overhead")
    yield f"{recipe} CUDA graphs", lambda: compiled("reduce-overhead")


def decoding(which: str, ready: Callable[[], None]) -> Row:
    """One token through layers of an 8-billion model, in CUDA graphs; `ready` waits for a turn."""
    with torch.device("cuda"):
        large = model(4096, 14336, LAYERS, 1024, 32)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    start = time.perf_counter()
    if which == "bf16":
        built = torch.compile(large, mode=GRAPHS)
    elif which == "backend":
        built = compiled_by_qpass(large, RECIPE, GRAPHS)
    else:
        sample = torch.ones(1, 4, dtype=torch.int64)
        made = qpass.quantize(large.cpu(), RECIPE, inputs=sample)
        built = torch.compile(made.cuda(), mode=GRAPHS)
    # the first runs of a CUDA graph warm up and record, later ones replay
    for _ in range(4):
        logits(built, token)
    torch.cuda.synchronize()
    prepared = time.perf_counter() - start
    ready()
    times: list[tuple[float, float]] = []
    for _ in range(10):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = time.perf_counter()
        first.record()
        for _ in range(TOKENS):
            logits(built, token)
        last.record()
        host = time.perf_counter() - begun
        last.synchronize()
        times.append((first.elapsed_time(last) / TOKENS, host * 1e3 / TOKENS))
    took, host = sorted(times)[len(times) // 2]
    return {"ms": took, "host_ms": host, "gpu_ms": _busy(built, token), "prepared_s": prepared}


def _busy(built: Callable[..., Any], token: Tensor) -> float:
    """From the first to the last kernel of a token, in milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        logits(built, token)
        torch.cuda.synchronize()
    found = [e.time_range for e in profile.events() if e.device_type.name == "CUDA"]
    # the first copies the token, before the graph is launched
    ranges = sorted((r.start, r.end) for r in found)[1:]
    return (max(end for _, end in ranges) - ranges[0][0]) / 1e3 if ranges else math.nan
