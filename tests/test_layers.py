"""Does every import point down, and is `import qpass` cheap?"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qpass"

LAYERS = (
    ("errors",),
    ("registry",),
    ("formats", "rotations", "ir"),
    ("rounding", "ops", "ranges"),
    ("analyze", "verify", "runtime"),
    ("capture", "plan"),
    ("calibrate",),
    ("transform", "quantize", "refine"),
    ("search",),
    ("targets", "report"),
    ("hf",),
    ("bounds",),
    ("api", "backend", "export"),
    ("evaluation", "engines"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# third-party packages and the only places, as path prefixes, that may import them
FENCES = {
    "transformers": ("qpass/hf/", "qpass/engines/"),
    "lm_eval": ("qpass/hf/",),
    "networkx": ("qpass/analyze/", "qpass/plan/"),
    # writing a file and running one are two files
    "onnx": ("qpass/targets/onnx_", "qpass/engines/"),
    "onnx_ir": ("qpass/targets/onnx_",),
    "onnxscript": ("qpass/targets/onnx_",),
    "onnxruntime": ("qpass/targets/onnx_", "qpass/engines/onnxruntime"),
    "openvino": ("qpass/engines/openvino",),
    "nncf": ("qpass/engines/openvino",),
    "llama_cpp": ("qpass/engines/",),
    "triton": ("kernels/gpu/",),
    "typer": ("qpass/cli/",),
    "rich": ("qpass/cli/", "qpass/report/"),
    "jinja2": ("qpass/report/",),
}
HEAVY = (
    "transformers",
    "lm_eval",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "llama_cpp",
    "triton",
    "networkx",
    "rich",
    "jinja2",
    "typer",
)


@dataclass(frozen=True, slots=True)
class Import:
    line: int
    module: str  # dotted, absolute


def imports(path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                # `from qpass import x` names the package in the alias
                yield Import(node.lineno, f"{module}.{alias.name}")


def violations(root: Path, path: Path) -> list[str]:
    """What `path`, a file of the checkout `root`, imports and may not."""
    where = path.relative_to(root).as_posix()
    parts = where.removesuffix(".py").split("/")
    importer = parts[1] if parts[0] == "qpass" else "kernels"
    found: list[str] = []
    for item in imports(path):
        top, *rest = item.module.split(".")
        if not top:
            found.append(f"{where}:{item.line}: relative import")
        elif top == "qpass":
            # the package itself is its public names, which belong to the calls of the API
            found += _sideways(where, item.line, importer, rest[0] if rest else "api")
        elif top in FENCES and not where.startswith(FENCES[top]):
            found.append(f"{where}:{item.line}: {top} belongs to {', '.join(FENCES[top])}")
    return found


def _sideways(where: str, line: int, importer: str, used: str) -> list[str]:
    if importer == "__init__" or used == importer or used == "_kernels":
        return []
    if importer == "kernels":
        # a kernel registers itself with the runtime and knows nothing above it
        allowed = used in LEVEL and LEVEL[used] <= LEVEL["runtime"]
    elif used not in LEVEL:
        # a name that `qpass/__init__.py` re-exports, or a package that LAYERS has never heard of
        allowed = False
    else:
        allowed = LEVEL[used] < LEVEL[importer]
    return [] if allowed else [f"{where}:{line}: {importer} may not import {used}"]


SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    assert violations(ROOT, path) == []


def test_every_package_has_a_level() -> None:
    names = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - {"__init__", "_kernels"} <= LEVEL.keys()


def test_kernels_is_no_package_and_shadows_nothing() -> None:
    # an installed package called `kernels` is imported by transformers; `triton` is triton's name
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "triton").exists()


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("qpass/ir/program.py", "from qpass.analyze import basis"),
        ("qpass/ir/program.py", "import qpass.formats.int4"),
        ("qpass/formats/int4.py", "from qpass import rotations"),
        ("qpass/plan/recipe.py", "from qpass.capture.export import capture"),
        ("qpass/analyze/basis.py", "from . import rules"),
        ("qpass/targets/module.py", "def f():\n    import transformers"),
        ("qpass/api.py", "from transformers import AutoConfig"),
        ("qpass/hf/cache.py", "import networkx as nx"),
        ("qpass/targets/module.py", "import onnx.helper"),
        ("qpass/runtime/device.py", "import triton"),
        ("kernels/gpu/linear.py", "from qpass.targets import inductor"),
        ("qpass/ir/program.py", "from qpass import quantize"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, where: str, line: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A question."""\n\n{line}\n', encoding="utf-8")
    assert len(violations(tmp_path, path)) == 1


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("qpass/analyze/basis.py", "import networkx as nx"),
        ("qpass/analyze/basis.py", "from qpass.analyze.rules import linear"),
        ("qpass/hf/cache.py", "from transformers import Cache"),
        ("qpass/cli/main.py", "from qpass import api"),
        ("kernels/gpu/linear.py", "import triton.language as tl"),
        ("kernels/gpu/linear.py", "from qpass.runtime.kernel import KERNELS"),
        ("qpass/__init__.py", "from qpass.api import quantize"),
    ],
)
def test_a_lawful_import_passes(tmp_path: Path, where: str, line: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A question."""\n\n{line}\n', encoding="utf-8")
    assert violations(tmp_path, path) == []


# torch itself imports some of these (networkx, for one) when they are installed, so what counts is
# what `import qpass` adds to `import torch`
LEAN = """
import sys
import torch
before = set(sys.modules)
import {module}
heavy = {{name.partition(".")[0] for name in set(sys.modules) - before}} & set({heavy!r})
assert not heavy, f"imported {{sorted(heavy)}}"
assert not torch.cuda.is_initialized(), "initialised CUDA"
"""


def run_lean(module: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = LEAN.format(module=module, heavy=HEAVY)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_import_is_lean() -> None:
    done = run_lean("qpass", ROOT)
    assert done.returncode == 0, done.stderr


def test_a_heavy_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import networkx.algorithms.bipartite, rich.table\n")
    done = run_lean("planted", tmp_path)
    assert done.returncode != 0
    assert "rich" in done.stderr
