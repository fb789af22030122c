"""Which calls fit a tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator

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

    def tokens(*shape: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, *shape), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    rest = {"decoder_input_ids": tokens(length - 2)} if _decodes(model, known) else {}
    main = _main(model, known)
    if "spatial_shapes" in known:
        high, wide = 4, length
        patch = model.config.vision_config.patch_size
        yield {
            "pixel_values": noise(high * wide, 3 * patch**2),
            "pixel_attention_mask": torch.ones(batch, high * wide, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[high, wide]] * batch),
        }
    elif main == "pixel_values":
        config = model.config
        size = getattr(config, "image_size", None) or IMAGE
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        yield {main: noise(int(getattr(config, "num_channels", None) or 3), high, wide)}
    elif main == "input_features":
        bins = _bins(model.config)
        # spectra come as rows of bins or as columns, of the longest length or of any
        for frames in (128, 16 * length):
            for shape in ((bins, frames), (frames, bins), (frames, 4 * bins)):
                yield {main: noise(*shape), **rest}
    elif main == "input_values":
        bins = _bins(model.config)
        for shape in ((100 * length,), (800 * length,), (1024, bins), (1, 100 * length)):
            yield {main: noise(*shape), **rest}
    elif steps := getattr(model.config, "audio_length_per_tok", 0):
        yield {
            "input_ids": tokens(length),
            "input_features": noise(_bins(model.config), steps * length),
        }
    yield {"input_ids": tokens(length), **rest}
    # several codes at each position, and perhaps a token
    text = model.config.get_text_config(decoder=True)
    if books := getattr(text, "num_codebooks", 0):
        yield {"input_ids": tokens(books * length).reshape(batch * books, length)}
        yield {"input_ids": tokens(length, books + 1)}
    if rest and (channels := getattr(text, "num_channels", 0)):
        yield {"input_ids": tokens(length), "decoder_input_ids": tokens(length - 2, channels)}


def _main(model: hf.PreTrainedModel, known: Container[str]) -> str:
    """What the model is mainly given, by its word and by what it accepts."""
    names = ("input_values", "input_features", "pixel_values")
    if (main := model.main_input_name) in (*names, "input_ids"):
        return main
    return next((name for name in names if name in known), "input_ids")


def _decodes(model: hf.PreTrainedModel, known: Container[str]) -> bool:
    return model.config.is_encoder_decoder and "decoder_input_ids" in known  # type: ignore


def _bins(config: hf.PretrainedConfig) -> int:
    for name in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"):
        if isinstance(bins := getattr(config, name, None), int):
            return bins
    return 16
