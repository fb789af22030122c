"""Does every command keep its promises about output, errors and exit codes?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from qpass.cli.main import run
from qpass.cli.output import check_folder
from qpass.errors import BadInput
from qpass.plan import Recipe, preset_names

ROOT = Path(__file__).parents[2]


def test_help_names_the_commands_and_imports_nothing_optional() -> None:
    code = (
        "import sys; from qpass.cli.main import run; run(['--help'])\n"
        "heavy = {'transformers', 'onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "recipes" in done.stdout


def test_no_arguments_show_help_and_fail() -> None:
    assert run([]) == 2


def test_an_unknown_command_and_option_exit_with_2(capsys) -> None:
    assert run(["quantise"]) == 2
    assert run(["recipes", "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().err


def test_recipes_lists_every_preset(capsys) -> None:
    assert run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in preset_names())


def test_recipes_as_json(capsys) -> None:
    assert run(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_printed_recipe_reads_back(name: str, capsys) -> None:
    assert run(["recipes", name]) == 0
    table = tomllib.loads(capsys.readouterr().out)
    assert Recipe.read(table) == Recipe.read(name)


def test_an_unknown_recipe_names_the_nearest_on_stderr(capsys) -> None:
    assert run(["recipes", "w8a9"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qpass: ")
    assert "did you mean 'w8a8'" in captured.err
    assert "Traceback" not in captured.err


def test_doctor_says_what_runs(capsys) -> None:
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "kernels" in out


def test_doctor_as_json(capsys) -> None:
    assert run(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["compiled"] == bool(facts["device"]["kernels"])
    assert facts["packages"]["transformers"]
    assert ("no CUDA device" in facts["GPU kernels"]) == (not torch.cuda.is_available())


def test_doctor_says_when_a_package_is_absent(capsys, monkeypatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run(["doctor"]) == 0
    assert "absent (models, caches, checkpoints)" in capsys.readouterr().out


def test_folders_that_can_be_written_pass(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "a" / "b", Path("relative"), Path()):
        check_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        check_folder(tmp_path / "file")
    with pytest.raises(BadInput, match="cannot be written"):
        check_folder(tmp_path / "file" / "below")
    if Path("/proc/self").is_dir():
        with pytest.raises(BadInput, match="cannot be written"):
            check_folder(Path("/proc/self/qpass"))
