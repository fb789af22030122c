"""Does MODEL on a command line find every kind of model, and name what is wrong otherwise?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qpass.cli.source import load
from qpass.errors import BadInput
from tests.zoo import specimen

FACTORY = '''
"""Models for a test."""
import torch

def alone():
    return torch.nn.Linear(3, 5)

def with_inputs():
    return torch.nn.Linear(3, 5), torch.ones(2, 3)

def wrong():
    return 7

def wrong_inputs():
    return torch.nn.Linear(3, 5), "text"

def broken():
    raise RuntimeError("the factory's own error")
'''


@pytest.fixture
def factories(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "planted_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "planted_factories", raising=False)
    return "planted_factories"


def test_a_factory_gives_a_model_and_perhaps_inputs(factories: str) -> None:
    assert isinstance(load(f"{factories}:alone").model, nn.Linear)
    assert load(f"{factories}:alone").inputs is None
    inputs = load(f"{factories}:with_inputs").inputs
    assert isinstance(inputs, torch.Tensor)
    assert inputs.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planted_factories:absent", "cannot import the factory"),
        ("no_such_module:factory", "cannot import the factory"),
        (":factory", "cannot import the factory"),
        ("planted_factories:wrong", "returned int"),
        ("planted_factories:wrong_inputs", "a dict of keyword arguments"),
    ],
)
def test_a_wrong_factory_is_named(factories: str, name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(name)


def test_an_error_inside_a_factory_says_where(factories: str) -> None:
    with pytest.raises(
        BadInput, match=r"RuntimeError: the factory's own error .*\.py:\d+\)"
    ) as found:
        load(f"{factories}:broken")
    assert isinstance(found.value.__cause__, RuntimeError)


def test_a_directory_is_read(tmp_path: Path) -> None:
    specimen("gpt2").build(0).save_pretrained(tmp_path)
    assert load(str(tmp_path)).model.get_input_embeddings().num_embeddings == 64


@pytest.mark.parametrize("what", ["nosuch", "no/such/folder", "./gone", "../gone/x", "/gone/y"])
def test_what_is_nothing_is_refused_without_asking_a_hub(what: str) -> None:
    with pytest.raises(BadInput, match="no model at"):
        load(what)


def test_a_slip_in_a_path_is_no_hub_id(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no model at models/absent"):
        load("models/absent")
