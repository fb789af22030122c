"""Does every command answer bad input with one paragraph and exit code 2, and leave nothing?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qpass
from qpass.cli.main import run
from tests.zoo import VOCABULARY, specimen

WORDS = [f"w{n}" for n in range(VOCABULARY)]
FACTORIES = '''
"""What a user may get wrong about a factory."""

import torch
from torch import nn

value = 3

def with_inputs(inputs):
    return nn.Linear(3, 5), inputs

def raises(): raise LookupError("the factory's own error")
def leaves(): raise SystemExit(5)
def takes(size): return nn.Linear(size, 5)
def none(): return None
def number(): return 7
def three(): return nn.Linear(3, 5), torch.ones(2, 3), 1
def kind(): return nn.Linear
def text_inputs(): return with_inputs("text")
def wrong_width(): return with_inputs(torch.ones(2, 4))
def wrong_type(): return with_inputs(torch.ones(2, 3, dtype=torch.int64))
def wrong_name(): return with_inputs({"y": torch.ones(2, 3)})
def too_many(): return with_inputs((torch.ones(2, 3), torch.ones(2)))
def on_meta(): return nn.Linear(3, 5, device="meta"), torch.ones(2, 3)
def no_inputs(): return nn.Linear(3, 5)

class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x

def branch(): return Branch(), torch.ones(2, 3)

class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 16)

    def forward(self, ids):
        return self.table(ids)

def out_of_vocabulary(): return Unknown(), torch.full((2, 3), 10)
'''


def _broken(folder: Path, source: str, name: str, damage: Callable[[Path], object]) -> None:
    shutil.copytree(folder / source, folder / name)
    damage(folder / name)


def _config(**changes: object) -> Callable[[Path], None]:
    def damage(where: Path) -> None:
        config = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps(config | changes))

    return damage


def _newer(where: Path) -> None:
    section = json.loads((where / "config.json").read_text())["quantization_config"]
    _config(quantization_config=section | {"format_version": 99})(where)


def _cut(where: Path) -> None:
    file = where / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good model, a good text, and everything that is not."""
    folder = tmp_path_factory.mktemp("template")
    model = specimen("llama_tied").build(0).to(torch.float32)
    model.save_pretrained(folder / "good")
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "good")
    qpass.save(qpass.quantize(model, "w8a16"), folder / "small")
    (folder / "good.txt").write_text(" ".join(WORDS * 4))
    (folder / "folder").mkdir()
    (folder / "folder" / "thesis.txt").write_text("years of work")
    (folder / "file").write_text("text")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("w1 w2")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "no.gguf").write_text("not gguf")
    (folder / "broken.toml").write_text("weight = [")
    (folder / "key.toml").write_text('rotashun = "on"')
    (folder / "broken.json").write_text("{")
    (folder / "factories.py").write_text(FACTORIES)
    (folder / "syntax.py").write_text("def f(:")
    (folder / "fails.py").write_text('raise RuntimeError("while it is imported")')
    _broken(folder, "good", "cut", _cut)
    _broken(folder, "small", "cut_small", _cut)
    _broken(folder, "good", "no_json", lambda w: (w / "config.json").write_text("{"))
    _broken(folder, "good", "no_weights", lambda w: (w / "model.safetensors").unlink())
    _broken(folder, "good", "of_another", _config(hidden_size=96))
    _broken(folder, "good", "from_the_future", _config(model_type="not_yet"))
    _broken(folder, "small", "newer", _newer)
    return folder


@pytest.fixture(autouse=True)
def here(template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(template)
    monkeypatch.syspath_prepend(str(template))
    return template


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says before it exits with 2, having written nothing anywhere."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert run(arguments) == 2
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert {p: t for p, t in after.items() if "__pycache__" not in p.parts and p.name} == before
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("qpass: ")
    assert errors.count("qpass: ") == 1
    assert errors.endswith("\n")
    assert "\n\n" not in errors
    assert "Traceback" not in errors
    return errors


TIMED = ["--eager", "--prompt", "3", "--tokens", "1", "--repetitions", "1"]
READ = ["--tokenizer", "good", "--length", "8", "--text"]
COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "inspect": lambda model: ["inspect", model],
    "quantize": lambda model: ["quantize", model, "-r", "w8a16", "-o", "out"],
    "export": lambda model: ["export", model, "-o", "out.onnx"],
    "eval": lambda model: ["eval", model, "--reference", "good", *READ, "good.txt"],
    "eval reference": lambda model: ["eval", "good", "--reference", model, *READ, "good.txt"],
    "bench": lambda model: ["bench", model, *TIMED],
    "bench reference": lambda model: ["bench", "good", "--reference", model, *TIMED],
}
NO_MODELS = {
    "": "MODEL is empty",
    "absent": "no model at absent",
    "absent/a/b": "no model at absent/a/b",
    "folder": "has no config.json",
    "folder/absent": "no model at folder/absent",
    "file": "is not a model: expected a directory",
    "no.gguf": "no model can be read from it",
    "absent.gguf": "no such file",
    "cut": "damaged or not complete",
    "cut_small": "damaged or not complete",
    "no_json": "not a valid JSON file",
    "no_weights": "no file named model.safetensors",
    "of_another": "its config.json asks for",
    "from_the_future": "not_yet",
    "newer": "update qpass",
    "factories:absent": "cannot import the factory",
    "no_such_module:f": "cannot import the factory",
    "syntax:f": "SyntaxError",
    "fails:f": "while it is imported",
    "factories:value": "expected a function",
    "factories:raises": "LookupError: the factory's own error",
    "factories:leaves": "SystemExit: 5",
    "factories:takes": "missing 1 required positional argument",
    "factories:none": "returned NoneType",
    "factories:number": "returned int",
    "factories:three": "returned tuple",
    "factories:kind": "returned type",
    "factories:text_inputs": "a dict of keyword arguments",
}


@pytest.mark.parametrize("model", NO_MODELS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_model(command: str, model: str, capsys) -> None:
    assert NO_MODELS[model] in complaint(COMMANDS[command](model), capsys)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrong_width", "shapes cannot be multiplied"),
        ("wrong_type", "same dtype"),
        ("wrong_name", "do not fit the model's forward"),
        ("too_many", "too many positional arguments"),
        ("on_meta", "device"),
        ("no_inputs", "inputs are needed"),
        ("branch", "cannot"),
        ("out_of_vocabulary", "not in the vocabulary"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "quantize", "export"])
def test_inputs_that_do_not_fit(command: str, name: str, says: str, capsys) -> None:
    assert says in complaint(COMMANDS[command](f"factories:{name}"), capsys)


TEXTS = {
    "absent.txt": "is no text that can be read",
    "folder": "is no text that can be read",
    "bytes.txt": "is no text that can be read",
    "empty.txt": "0 tokens hold no window of 8",
    "short.txt": "2 tokens hold no window of 8",
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_text(text: str, capsys) -> None:
    quantize = ["quantize", "good", "-o", "out", "--length", "8"]
    for command in (
        ["eval", "small", "--reference", "good", *READ, text],
        [*quantize, "--text", text],
        [*quantize, "--calibration", text],
    ):
        assert TEXTS[text] in complaint(command, capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-r", "w8a9"], "did you mean 'w8a8'"),
        (["-r", "absent.toml"], "absent.toml: cannot be read"),
        (["-r", "broken.toml"], "is not TOML"),
        (["-r", "key.toml"], "did you mean 'rotation'"),
        (["-r", "./folder"], "cannot be read"),
        (["--set", "rotation=sideways"], '"on" or "off" or "auto"'),
        (["--set", "seed=-1"], "an integer from 0"),
        (["--set", "seed=many"], "an integer from 0"),
        (["--set", "hed=int8"], "did you mean 'head'"),
        (["--set", "rounding=nearesd"], "did you mean 'nearest'"),
        (["--set", "residual=hadamart"], "did you mean 'hadamard'"),
        (["--set", "weight.format=int9"], "did you mean 'int"),
        (["--set", "weight.blok=32"], "did you mean 'block'"),
        (["--set", "[weight]=1"], "is no key"),
        (["--set", "=1"], "is no key"),
        (["--set", "seed"], "expected KEY=VALUE"),
        (["--plan", "absent.json"], "cannot be read"),
        (["--plan", "broken.json"], "is not JSON"),
        (["--gate", "kll=1", "--text", "good.txt"], "did you mean 'kl'"),
        (["--gate", "kl=low", "--text", "good.txt"], "expected kl=NUMBER"),
        (["--gate", "kl=1"], "add --text FILE"),
        (["--tokenizer", "folder", "--text", "good.txt"], "no tokenizer"),
        (["--length", "1"], "--length"),
        (["--windows", "none"], "--windows"),
        (["-o", "folder"], "holds no model saved by qpass"),
        (["-o", "file"], "is a file"),
        (["-o", "file/out"], "is a file"),
        (["--outputs", "there"], "--outputs"),
    ],
)
def test_wrong_options_of_quantize(options: list[str], says: str, capsys) -> None:
    output = [] if "-o" in options else ["-o", "out"]
    assert says in complaint(["quantize", "good", *output, *options], capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantise"], "did you mean 'quantize'"),
        (["inspect"], "MODEL"),
        (["inspect", "good", "good"], "good"),
        (["inspect", "good", "--html", "folder"], "is a directory"),
        (["inspect", "good", "--html", "absent/page.html"], "there is no directory absent"),
        (["quantize", "good"], "--output"),
        (["recipes", "w8a9"], "did you mean 'w8a8'"),
        (["recipes", "broken.toml"], "is not TOML"),
        (["doctor", "good"], "good"),
        (["export", "good"], "--output"),
        (["export", "good", "-o", "out.onnx", "--target", "qdk"], "did you mean 'qdq'"),
        (["export", "good", "-o", "folder"], "is a directory"),
        (["eval", "small", "--reference", "good"], "--text"),
        (["eval", "small", "--reference", "good", *READ, "good.txt", "--gate", "k=1"], "'kl'"),
        (["bench", "good", "--prompt", "0"], "--prompt"),
        (["bench", "factories:no_inputs", *TIMED], "does not write tokens"),
        (["quantize", "small", "-r", "w8a16", "-o", "out"], "quantized already"),
        (["inspect", "small"], "quantized already"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, capsys) -> None:
    assert says.lower() in complaint(arguments, capsys).lower()


def test_a_model_whose_vocabulary_is_another(tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 " * 9)
    config = specimen("llama_tied").build(0).config
    config.vocab_size = 2
    type(specimen("llama_tied").build(0))(config).float().save_pretrained(tmp_path / "few")
    command = ["eval", str(tmp_path / "few"), "--reference", "good", *READ, str(text)]
    assert "not in the vocabulary" in complaint(command, capsys)


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qpass.cli.inspect.load", interrupt)
    assert run(["inspect", "good"]) == 130
    assert "Traceback" not in capsys.readouterr().err
