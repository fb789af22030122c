"""Does the code keep the house rules that no linter knows?"""

from __future__ import annotations

import ast
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.zoo import ZOO

ROOT = Path(__file__).parents[1]
LONGEST = 400  # lines; a file that grows past it is two ideas
VAGUE = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "tools", "stuff"})
SOURCE = (".py", ".cpp", ".h", ".hpp", ".cu")

# model families whose name is also a word, an abbreviation or a letter that code may use
_ORDINARY = (
    "align audio bark beam big bit bros chinese clap clip conditional d data decision "
    "deformable depth dia diffusion dots embedding encoder fast flex flint fun funnel fuse "
    "git got granite grounding hy led luke lw m mask mimo mm moss mt muse mvp opt pe "
    "perception phi pi pix pocket pop pp prompt radio rag recurrent rf roc rt sam seamless "
    "seed solar speech splinter step switch t table time unlimited video vision visual wav x "
    "yolos "
)
ORDINARY = frozenset(_ORDINARY.split())


def families() -> frozenset[str]:
    """Lower-case names of model families, as transformers spells them."""
    heads = {re.match("[a-z]+", name.lower()) for name in CONFIG_MAPPING_NAMES}
    return frozenset(head.group() for head in heads if head) - ORDINARY


def numbered() -> frozenset[str]:
    """Model types with a digit in them, such as a family and its generation."""
    names = {name.lower().replace("-", "_") for name in CONFIG_MAPPING_NAMES}
    return frozenset(n for n in names if len(n) > 2 and any(c.isdigit() for c in n))


def layer_names() -> frozenset[str]:
    """What transformers' models call their parts, less what torch calls its operators."""
    names: set[str] = set()
    for entry in ZOO:
        model = entry.build(0)
        if isinstance(model, PreTrainedModel):
            for path, _ in (*model.named_modules(), *model.named_parameters()):
                names.update(path.split("."))
    telling = {n for n in names if "_" in n or re.fullmatch(r"[a-z]+\d", n)} | {"wte", "wpe"}
    return frozenset(n for n in telling if n not in dir(torch.nn.functional))


FAMILIES = families()
NUMBERED = numbered()
LAYERS = layer_names()
STEMS = frozenset(name.removesuffix("Config") for name in CONFIG_MAPPING_NAMES.values())
CLASS = re.compile(
    r"(\w+?)(?:Config|Model|For[A-Z]\w*|PreTrained\w*|Attention|MLP|Block|Layer|DecoderLayer|RMSNorm)"
)
# an engine that is called like the model it was first written for
ENGINE = re.compile(r"llama\.cpp|llama_cpp\.Llama\b")
# the machine's own folders and the addresses of registries, put together so as not to find itself
MACHINE = re.compile(
    r"(?<![\w.])/(?:work|farm|root|home|opt|Users)/|"
    + "|".join(("pypi" + r"\.org", "python" + "hosted", "npm" + r"js\.", r"download\.py" + "torch"))
)


@functools.cache
def is_model_name(word: str) -> bool:
    low = word.lower()
    made = CLASS.fullmatch(word)
    return (
        low in NUMBERED
        or low.rstrip("0123456789") in FAMILIES
        or word in LAYERS
        or (made is not None and made[1] in STEMS)
    )


def model_names(path: Path, text: str) -> Iterator[str]:
    """A model's, a family's or a layer's name."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in re.findall(r"[A-Za-z_]\w*", ENGINE.sub("", line)):
            if is_model_name(word):
                yield f"{path}:{number}: {word} is a name from a model"


def length(path: Path, text: str) -> Iterator[str]:
    """Too many lines."""
    if (lines := len(text.splitlines())) > LONGEST:
        yield f"{path}: {lines} lines, the limit is {LONGEST}"


def vague_name(path: Path, text: str) -> Iterator[str]:
    """A file name that fits everything."""
    if path.stem in VAGUE:
        yield f"{path}: {path.stem} says nothing"


def machine(path: Path, text: str) -> Iterator[str]:
    """A path or an address that holds on one machine only."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := MACHINE.search(line):
            yield f"{path}:{number}: {found.group()}"


def broad_except(path: Path, text: str) -> Iterator[str]:
    """An `except` that catches what it does not expect."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {None if k is None else ast.unparse(k).split(".")[-1] for k in kinds}
        # a handler around code of the user's may say so where ruff wants to hear it, or raise
        excused = re.search(r"# noqa: BLE001 +\w", text.splitlines()[node.lineno - 1])
        if names & {None, "Exception", "BaseException"} and not (
            excused or isinstance(node.body[-1], ast.Raise)
        ):
            yield f"{path}:{node.lineno}: catches everything"


def first_line(path: Path, text: str) -> Iterator[str]:
    """A module that does not open with one sentence about what it answers."""
    doc = ast.get_docstring(ast.parse(text)) or ""
    if text.strip() and not doc.partition("\n")[0].endswith((".", "?")):
        yield f"{path}: does not open with one sentence"


def private_import(path: Path, text: str) -> Iterator[str]:
    """A private name of another qpass module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qpass"):
            for alias in node.names:
                if alias.name.startswith("_") and alias.name != "_kernels":
                    yield f"{path}:{node.lineno}: {alias.name} is private to {node.module}"


def unfinished(path: Path, text: str) -> Iterator[str]:
    """A note to self."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", line):
            yield f"{path}:{number}: {found.group()}"


Rule = Callable[[Path, str], Iterator[str]]
# rule -> the folders it reads and the endings of the files in them
SCOPE: dict[Rule, tuple[tuple[str, ...], tuple[str, ...]]] = {
    model_names: (("qpass", "kernels"), SOURCE),
    length: (("qpass", "kernels", "tests", "examples"), SOURCE),
    vague_name: (("qpass", "kernels", "tests", "examples"), SOURCE),
    machine: (("",), (*SOURCE, ".md", ".toml", ".txt", ".yml", "Makefile", "run", ".cmake")),
    broad_except: (("qpass", "kernels", "tests", "examples"), (".py",)),
    first_line: (("qpass", "kernels", "tests", "examples"), (".py",)),
    private_import: (("qpass", "kernels", "examples"), (".py",)),
    unfinished: (("qpass", "kernels", "tests", "examples"), SOURCE),
}
# what builds and tools leave behind
SKIPPED = frozenset({".git", ".venv", ".data", "build", "dist", "__pycache__", ".hypothesis"})


def violations(root: Path, rule: Rule) -> list[str]:
    """What `rule` finds in the checkout `root`."""
    folders, endings = SCOPE[rule]
    found: list[str] = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            where = path.relative_to(root)
            if path.name.endswith(endings) and path.is_file() and not SKIPPED & set(where.parts):
                found += rule(where, path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("rule", SCOPE, ids=lambda r: r.__name__)
def test_rule_holds(rule: Rule) -> None:
    assert violations(ROOT, rule) == []


PLANTED: list[tuple[Rule, str, str]] = [
    (model_names, "qpass/analyze/planted.py", 'if "q_proj" in name:'),
    (model_names, "qpass/analyze/planted.py", "weight = model.lm_head.weight"),
    (model_names, "qpass/hf/planted.py", "from transformers import LlamaForCausalLM"),
    (model_names, "qpass/hf/planted.py", 'if config.model_type == "qwen2":'),
    (model_names, "qpass/plan/planted.py", "# as in Gemma"),
    (model_names, "qpass/plan/planted.py", "x = OPTDecoderLayer"),
    (model_names, "kernels/cpu/planted.cpp", "// shapes of mistral"),
    (length, "qpass/ir/planted.py", "\n" * LONGEST),
    (vague_name, "qpass/ir/utils.py", ""),
    (machine, "Makefile", "PYTHON := /" + "opt/python"),
    (machine, "README.md", "https://" + "pypi" + ".org/simple"),
    (broad_except, "qpass/ir/planted.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (broad_except, "qpass/ir/planted.py", "try:\n    f()\nexcept:\n    pass"),
    (broad_except, "tests/planted.py", "try:\n    f()\nexcept (ValueError, BaseException):\n    1"),
    (first_line, "qpass/ir/planted.py", "x = 1"),
    (private_import, "qpass/ir/planted.py", "from qpass.ir.program import _call"),
    (unfinished, "qpass/ir/planted.py", "# TO" + "DO: later"),
]


@pytest.mark.parametrize(
    ("rule", "where", "text"),
    PLANTED,
    ids=[f"{r.__name__}-{i}" for i, (r, *_) in enumerate(PLANTED)],
)
def test_a_planted_violation_is_found(tmp_path: Path, rule: Rule, where: str, text: str) -> None:
    for folder in ("qpass", "kernels"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tmp_path / folder)
    before = violations(tmp_path, rule)
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    found = set(violations(tmp_path, rule)) - set(before)
    assert found
    assert all(line.startswith(where) for line in found)
