"""Does the library's own way of saving a changed model lose nothing?"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.errors import BadInput, StateError
from qpass.verify.exact import largest_error
from tests.architectures.catalogue import architecture
from tests.architectures.models import outputs, subject
from tests.zoo import specimen, tokens

CHANGES = {
    "rotate": lambda model: qpass.rotate(model, tokens()),
    "quantize": lambda model: qpass.quantize(model, "w8a8", inputs=tokens()),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def changed(name: str, change: str) -> hf.PreTrainedModel:
    model = specimen(name).build(0).float()
    CHANGES[change](model)
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "gpt2"])
def test_what_is_saved_is_read_as_it_was(name: str, change: str, tmp_path: Path) -> None:
    model = changed(name, change)
    want = logits(model)
    for place in ("first", "second"):
        model.save_pretrained(tmp_path / place)
        model = type(model).from_pretrained(tmp_path / place).eval()
        assert torch.equal(logits(model), want)


# one asks its parts for their widths when it is built, one has configs that no name tells
@pytest.mark.parametrize("name", ["wav2vec2", "encoder-decoder"])
def test_models_that_look_into_their_parts_are_read(name: str, tmp_path: Path) -> None:
    tiny = subject(architecture(name))
    model = tiny.model
    qpass.rotate(model, tiny.first)
    want = outputs(model, tiny.first)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert largest_error(outputs(read, tiny.first), want) < 1e-12


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = changed("llama", "rotate")
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.lm_head.weight.mul_(2)
    made.save_pretrained(tmp_path / "copy", max_shard_size="1GB")
    assert torch.equal(logits(qpass.load(tmp_path / "copy")), logits(made))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = changed("llama", "rotate")
    with pytest.raises(StateError, match="part of a model"):
        model.model.save_pretrained(tmp_path / "part")
    with pytest.raises(BadInput, match="variant"):
        model.save_pretrained(tmp_path / "whole", variant="fp16")
    model.save_pretrained(tmp_path / "other_process", is_main_process=False)
    assert not any(tmp_path.iterdir())


def test_norms_stay_parameters_of_their_own() -> None:
    model = changed("llama", "rotate")
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in model.named_parameters(remove_duplicate=False)]
