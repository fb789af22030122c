"""Does a changed model show what it showed: hidden states, parts, embeddings, ties and files?"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import transformers as hf
from torch import Tensor
from torch.utils import _pytree as pytree

from qpass.errors import QpassError
from qpass.verify.exact import largest_error
from tests.architectures.inputs import Call
from tests.architectures.models import called

SAME, REFUSED, ABSENT = "same", "refused", "absent"
_HIDDEN = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")

Look = Callable[[hf.PreTrainedModel, Call], object]


def surface(
    original: hf.PreTrainedModel, changed: hf.PreTrainedModel, call: Call, limit: float
) -> dict[str, str]:
    """What came of each look at the models: `SAME`, `REFUSED`, or what differs.

    `ABSENT` where the original itself cannot be looked at so.
    """
    return {
        look.__name__: _compared(look, original, changed, call, limit)
        for look in (hidden_states, base_model, inputs_embeds, tied_again, saved_and_loaded)
    }


def hidden_states(model: hf.PreTrainedModel, call: Call) -> object:
    """What the model returns of its layers."""
    result = called(model, call, output_hidden_states=True)
    return [found for name in _HIDDEN if (found := result.get(name)) is not None]


def base_model(model: hf.PreTrainedModel, call: Call) -> object:
    """What the model without its head returns, its last hidden states first."""
    return called(_unlike(model, model.base_model), call)


def inputs_embeds(model: hf.PreTrainedModel, call: Call) -> object:
    """What the model returns for the rows of its embedding instead of tokens."""
    rest = {name: value for name, value in call.items() if name != "input_ids"}
    rows = model.get_input_embeddings()(call["input_ids"])
    return called(model, {**rest, "inputs_embeds": rows})


def tied_again(model: hf.PreTrainedModel, call: Call) -> object:
    """What a copy returns after it has tied its weights."""
    model = copy.deepcopy(model)
    model.tie_weights()
    return called(model, call)


def saved_and_loaded(model: hf.PreTrainedModel, call: Call) -> object:
    """What the model returns once it comes from a file."""
    how = model.config._attn_implementation
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dtype = next(model.parameters()).dtype
        loaded = type(model).from_pretrained(folder, dtype=dtype, attn_implementation=how)
    return called(loaded.eval(), call)


def _unlike(model: hf.PreTrainedModel, part: hf.PreTrainedModel) -> hf.PreTrainedModel:
    if part is model:
        raise LookupError("the model is its own base")
    return part


def _compared(
    look: Look,
    original: hf.PreTrainedModel,
    changed: hf.PreTrainedModel,
    call: Call,
    limit: float,
) -> str:
    try:
        want = _floats(look(original, call))
        # a model that is another one after that is so without qpass
        whole = look in (tied_again, saved_and_loaded)
        kept = not whole or largest_error(want, _floats(called(original, call))) <= limit
    except Exception:  # noqa: BLE001  the model's code may raise anything
        return ABSENT
    if not want or not kept:
        return ABSENT
    try:
        got = _floats(look(changed, call))
    except QpassError as error:
        return f"{REFUSED}: {' '.join(str(error).split())[:160]}"
    except Exception as error:  # noqa: BLE001  what nobody expected is what is looked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    error = largest_error(got, want)
    # comparisons with NaN are false, so this order refuses it
    return SAME if error <= limit else f"moved by {error:.0e}"


def _floats(values: object) -> list[Tensor]:
    leaves = pytree.tree_leaves(
        dict(values) if isinstance(values, hf.utils.ModelOutput) else values
    )
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
