"""Which calls fit a tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import transformers as hf
from torch import Tensor

from tests.architectures.shrink import IMAGE, VOCABULARY

Call = dict[str, Tensor]


def calls(model: hf.PreTrainedModel, *, batch: int, length: int, seed: int) -> Iterator[Call]:
    """What `model` may take, the likeliest first; lengths are in tokens."""
    generator = torch.Generator().manual_seed(seed)
    known = inspect.signature(model.forward).parameters
    dtype = next(model.parameters()).dtype

    def tokens(width: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, width), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    rest = {"decoder_input_ids": tokens(length - 2)} if _decodes(model, known) else {}
    main = model.main_input_name
    if main == "pixel_values":
        config = model.config
        size = getattr(config, "image_size", None) or IMAGE
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        yield {main: noise(int(getattr(config, "num_channels", None) or 3), high, wide)}
    elif main == "input_features":
        bins = _bins(model.config)
        # spectra come as rows of bins or as columns, of the longest length or of any
        for frames in (128, 16 * length):
            yield {main: noise(bins, frames), **rest}
            yield {main: noise(frames, bins), **rest}
    elif main == "input_values":
        bins = _bins(model.config)
        for shape in ((100 * length,), (800 * length,), (1024, bins), (1, 100 * length)):
            yield {main: noise(*shape), **rest}
    yield {"input_ids": tokens(length), **rest}
    if books := getattr(model.config.get_text_config(decoder=True), "num_codebooks", 0):
        yield {"input_ids": tokens(books * length).reshape(batch * books, length)}


def _decodes(model: hf.PreTrainedModel, known: object) -> bool:
    return model.config.is_encoder_decoder and "decoder_input_ids" in known  # type: ignore


def _bins(config: hf.PretrainedConfig) -> int:
    for name in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"):
        if isinstance(bins := getattr(config, name, None), int):
            return bins
    return 16
