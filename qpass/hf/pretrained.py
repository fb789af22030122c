"""Which model and which tokenizer do a directory, a GGUF file and a hub id stand for?"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qpass.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GGUF = ".gguf"

T = TypeVar("T")


def load_model(where: str | Path) -> nn.Module:
    """The model in evaluation mode, in the precision it is stored in; never read with pickle.

    `where` is a directory, a GGUF file (widened to float32) or a hub id. Raises `BadInput` where
    there is no model, or one whose weights are not all there.
    """
    path = Path(where)
    if path.is_dir() and not (path / "config.json").is_file():
        raise BadInput(f"{where} is not a model: the directory has no config.json")
    if path.is_file() and path.suffix != GGUF:
        raise BadInput(f"{where} is not a model: expected a directory or a {GGUF} file")
    if path.suffix == GGUF:
        if not path.exists():
            raise BadInput(f"no such file: {where}")
        model, missing = _from_gguf(path)
    else:
        model, missing = _from_pretrained(str(where))
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise BadInput(
            f"{where} lacks {len(missing)} weights of its own architecture, among them {some}; "
            "what it holds is not the whole model"
        )
    return model.eval()


def load_tokenizer(where: str | Path) -> Any:  # noqa: ANN401  a class that transformers chooses
    """The tokenizer of the model at `where`."""
    transformers = _transformers()
    folder, options = _source(where)
    load = transformers.AutoTokenizer.from_pretrained
    return _read(where, "tokenizer", lambda: load(folder, **options))


def token_ids(where: str | Path, text: str) -> Tensor:
    """`text` in the tokens of the model at `where`, without special tokens, `[n]`."""
    ids = load_tokenizer(where)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(cast("list[int]", ids), dtype=torch.int64, device="cpu")


def hide_progress() -> None:
    """Keep transformers from drawing progress bars, which it also does in a pipe."""
    _transformers().utils.logging.disable_progress_bar()


def _from_pretrained(where: str) -> tuple[nn.Module, set[str]]:
    transformers = _transformers()
    config: PretrainedConfig = _read(
        where, "model", lambda: transformers.AutoConfig.from_pretrained(where)
    )
    # the class that the checkpoint was saved from; without one, the architecture's bare stack
    name = (config.architectures or ["AutoModel"])[0]
    try:
        kind = getattr(transformers, name)
    except AttributeError as error:
        raise BadInput(
            f"{where}: this transformers has no {name}; models with code of their own are not run"
        ) from error
    return _loaded(where, kind, where, {"dtype": "auto", "use_safetensors": True})


def _from_gguf(where: Path) -> tuple[nn.Module, set[str]]:
    folder, options = _source(where)
    kind = _transformers().AutoModelForCausalLM
    model, missing = _loaded(where, kind, folder, {**options, "dtype": torch.float32})
    # the weights are floats by now, and what is saved from them should say so
    owner = cast("Any", model)
    owner.hf_quantizer = None
    del owner.config.quantization_config
    return model, missing


def _loaded(
    where: str | Path, kind: object, folder: str, options: dict[str, object]
) -> tuple[nn.Module, set[str]]:
    load = cast("Any", kind).from_pretrained
    # what does not fit is named below, and not in a table on stderr
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    with _quiet():
        pair = _read(where, "model", lambda: load(folder, **options))
    model, info = cast("tuple[nn.Module, dict[str, Any]]", pair)
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise BadInput(
            f"{where}: {name} is {list(stored)}, its config.json asks for {list(wanted)}; "
            "weights and config are not of the same model"
        )
    return model, set(info["missing_keys"])


def _source(where: str | Path) -> tuple[str, dict[str, object]]:
    path = Path(where)
    if path.suffix == GGUF:
        return str(path.parent), {"gguf_file": path.name}
    return str(where), {}


def _read(where: str | Path, what: str, load: Callable[[], T]) -> T:
    from safetensors import SafetensorError

    try:
        return load()
    except SafetensorError as error:
        raise BadInput(
            f"{where}: a file of weights is damaged or not complete ({error}); copy it again"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise BadInput(f"{where}: no {what} can be read from it: {first}") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without the reports of transformers; what is wrong is raised."""
    logging = _transformers().utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _transformers() -> Any:  # noqa: ANN401  a module whose attributes are looked up by name
    try:
        import transformers
    except ImportError as error:
        raise Unsupported("this needs transformers; pip install 'qpass[hf]'") from error
    return transformers
