"""Does ONNX Runtime compute from an exported file what PyTorch computes from the module?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.hf.cached import Cached
from qpass.ops import pack_linear
from qpass.rotations import Key, Transform
from qpass.targets import onnx_qdq
from qpass.targets.layers import QuantizedLinear, RotatedLinear
from qpass.targets.onnx_qdq import OnnxReport
from qpass.targets.onnx_run import run
from qpass.targets.tables import QuantizedEmbedding
from tests.zoo import tiny, tokens

# sums of float32 in another order, through a few layers
CLOSE = 3e-6
WIDTH = 96


def linear(
    seed: int,
    bits: int,
    block: int | None,
    *,
    n: int = 37,
    offsets: bool = False,
    online: bool = False,
    bias: bool = False,
) -> QuantizedLinear:
    random = torch.Generator().manual_seed(seed)
    unsigned = offsets and bits == 4
    low, high = (0, 16) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    dtype = torch.uint8 if unsigned else torch.int8
    codes = torch.randint(low, high, (n, WIDTH), generator=random).to(dtype)
    groups = (n, WIDTH // (block or WIDTH))
    scales = (torch.rand(groups, generator=random) - 0.3).half()
    shifts = torch.randn(groups, generator=random).half()
    packed = pack_linear(
        codes,
        torch.rand(n, generator=random) + 0.1,
        scales if block or offsets else None,
        shifts if offsets else None,
        bits=bits,
    )
    transform = Transform("hadamard", WIDTH, Key("here", seed)) if online else None
    added = torch.randn(n, generator=random) if bias else None
    return QuantizedLinear(packed, added, dtype=torch.float32, transform=transform)


class Parts(nn.Module):
    """Every kind of layer once, each with an output of its own; one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(9)
        codes = torch.randint(-128, 128, (11, WIDTH), generator=random).to(torch.int8)
        scales = torch.rand(11, generator=random)
        self.table = QuantizedEmbedding(codes, scales, dtype=torch.float32)
        wide = Transform("hadamard", 1024, Key("wide", 2))
        self.rotated = RotatedLinear(torch.randn(5, 1024, generator=random), transform=wide)
        self.layers = nn.ModuleList(
            [
                linear(0, 4, 32),
                linear(1, 4, None, bias=True),
                linear(2, 8, None, online=True, bias=True),
                linear(3, 4, 16, offsets=True, online=True),
                linear(4, 8, 32, offsets=True),
                linear(5, 4, None, offsets=True),
                linear(6, 4, 48),
                linear(7, 4, 12),
            ]
        )
        self.again = self.layers[0]

    def forward(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        y = x + self.table(ids)
        found = {f"layer{i}": layer(y) for i, layer in enumerate(self.layers)}
        found["again"] = self.again(2 * y)
        found["rotated"] = self.rotated(nn.functional.pad(y, (0, 1024 - WIDTH)))
        return found


def parts_inputs(b: int, t: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(b * t)
    ids = torch.randint(0, 11, (b, t), generator=random)
    return {"ids": ids, "x": torch.randn(b, t, WIDTH, generator=random)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Path, OnnxReport]:
    model, path = Parts(), tmp_path_factory.mktemp("parts") / "parts.onnx"
    before = list(model.named_modules())
    report = qpass.export_onnx(model, parts_inputs(2, 3), path)
    assert list(model.named_modules()) == before
    return model, path, report


@pytest.mark.parametrize(("b", "t"), [(2, 3), (1, 1), (3, 5)])
def test_every_layer_is_what_it_was(parts: tuple[Parts, Path, OnnxReport], b: int, t: int) -> None:
    model, path, _ = parts
    given = parts_inputs(b, t)
    found, _ = run(path, given)
    with torch.no_grad():
        wanted = model(**given)
    for (name, want), got in zip(wanted.items(), found, strict=True):
        assert float((got - want).norm() / want.norm()) < CLOSE, name


def test_integer_weights_fuse_and_the_report_says_which(
    parts: tuple[Parts, Path, OnnxReport],
) -> None:
    model, path, report = parts
    parity = qpass.onnx_parity(model, parts_inputs(2, 3), path)
    assert parity.error < CLOSE
    # the layer in two places is decoded for both; blocks of 12 have no kernel
    assert report.fusible == parity.operators["MatMulNBits"] == report.linears - 2
    assert [note.where for note in report.notes] == ["layers.7"]
    assert "blocks of 12" in report.notes[0].why


def test_codes_are_stored_in_their_bits(parts: tuple[Parts, Path, OnnxReport]) -> None:
    _, path, report = parts
    graph = onnx.load(path).graph
    kinds = {i.name: i.data_type for i in graph.initializer}
    assert kinds["layers.1.int4_codes"] == onnx.TensorProto.INT4
    assert kinds["layers.2.int8_codes"] == onnx.TensorProto.INT8
    assert kinds["table.int8_codes"] == onnx.TensorProto.INT8
    assert report.bytes == path.stat().st_size
    assert str(Path.cwd()).encode() not in path.read_bytes()


def test_bits_of_activations_are_a_note(tmp_path: Path) -> None:
    layer = linear(0, 8, None)
    layer.activation_bits = 8
    given = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    report = qpass.export_onnx(layer, given, tmp_path / "model.onnx")
    assert ["stay float" in note.why for note in report.notes] == [True]
    parity = qpass.onnx_parity(layer, given, tmp_path / "model.onnx")
    assert CLOSE < parity.error < 0.02


def test_large_tensors_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_qdq, "LARGEST_INLINE", 100)
    given = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.onnx"
    (tmp_path / "other.onnx").touch()
    (tmp_path / "model.onnx.0123456789abcdef.data").touch()
    layer = linear(0, 8, 32)
    report = qpass.export_onnx(layer, given, path)
    assert qpass.onnx_parity(layer, given, path).error < CLOSE
    # the tensors of an earlier file went with it
    assert {p.name for p in tmp_path.iterdir()} == {"other.onnx", *(f.name for f in report.files)}
    assert report.bytes == sum(f.stat().st_size for f in report.files)
    before = [f.read_bytes() for f in report.files]
    again = qpass.export_onnx(layer, given, path)
    assert dataclasses.asdict(again) == dataclasses.asdict(report)
    assert [f.read_bytes() for f in again.files] == before


def test_an_interrupted_export_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_qdq.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qpass.export_onnx(nn.Linear(3, 2), torch.ones(2, 3), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("where", "why"),
    [("missing/model.onnx", "no directory"), (".", "is a directory"), ("file/m.onnx", "directory")],
)
def test_a_path_that_takes_no_file(tmp_path: Path, where: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(qpass.QpassError, match=why):
        qpass.export_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / where)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(qpass.QpassError, match="qdq"):
        qpass.export_onnx(nn.Linear(3, 2), torch.ones(2, 3), path, target="qdk")
    with pytest.raises(qpass.QpassError, match=r"model\.float\(\)"):
        qpass.export_onnx(nn.Linear(3, 2).double(), torch.ones(2, 3).double(), path)
    with pytest.raises(qpass.QpassError, match="no such file"):
        qpass.onnx_parity(nn.Linear(3, 2), torch.ones(2, 3), path)


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_qdq.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(qpass.QpassError, match=r"qpass\[onnx\]"):
        qpass.export_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "model.onnx")


CONFIGS = {
    "grouped": hf.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "learned_positions": hf.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=64, n_head=4, n_layer=1, bos_token_id=1
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "products"),
    [
        ("grouped", None, 0),
        ("grouped", "w4a16-g64", 8),
        ("grouped", "w4a8", 8),
        ("learned_positions", "w8a16", 5),
    ],
)
def test_decoders(tmp_path: Path, name: str, recipe: str | None, products: int) -> None:
    model = tiny(CONFIGS[name]).float()
    path = tmp_path / "model.onnx"
    if recipe is not None:
        qpass.quantize(model, recipe, inputs={"input_ids": tokens()})
    report = qpass.export_onnx(model, {"input_ids": tokens()}, path)
    parity = qpass.onnx_parity(model, tokens(1, 9), path)
    assert parity.operators["MatMulNBits"] == report.linears == report.fusible == products
    if recipe == "w4a8":
        # activations are float in the file
        assert parity.error < 0.1
        return
    assert parity.error < CLOSE
    cached = Cached(model)
    random = torch.Generator().manual_seed(0)
    heads = 2 if name == "grouped" else 4
    for b, t, past in ((2, 3, 5), (1, 7, 0), (1, 1, 9), (3, 4, 2)):
        given = {
            "input_ids": tokens(b, t),
            "attention_mask": torch.ones(b, past + t, dtype=torch.int64),
            "position_ids": torch.arange(past, past + t).repeat(b, 1),
        }
        pair = [torch.randn(b, heads, past, 16, generator=random) for _ in range(2)]
        with torch.no_grad():
            logits, layers = cached(given, [(pair[0], pair[1])])
        feeds = {"past_key_values.0.key": pair[0], "past_key_values.0.value": pair[1], **given}
        for got, want in zip(run(path, feeds)[0], (logits, *layers[0]), strict=True):
            assert float((got - want).norm() / want.norm()) < CLOSE
