"""How `from_pretrained` of transformers reads a directory that qpass saved; import registers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpass.errors import StateError
from qpass.hf.saving import take_over_saving
from qpass.targets.checkpoint import CONFIG, METHOD, SECTION, complete, prepare, read_section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class QpassConfig(QuantizationConfigMixin):
    """The qpass section of a config, as it was read."""

    def __init__(self, **table: object) -> None:
        self.quant_method = cast("Any", METHOD)
        self.table = {**table, "quant_method": METHOD}
        read_section({SECTION: self.table}, CONFIG)

    def to_dict(self) -> dict[str, Any]:
        """The section again."""
        return dict(self.table)


@register_quantizer(METHOD)
class QpassQuantizer(HfQuantizer):
    """Puts the layers of the checkpoint into a model before and after its tensors are read."""

    requires_calibration = True

    def __init__(self, quantization_config: QpassConfig, **kwargs: object) -> None:
        if not kwargs.get("pre_quantized", True):
            raise StateError(
                "from_pretrained reads models that qpass saved; to make one, "
                "load the float model and call qpass.quantize"
            )
        # the decorator above is not annotated and hides what the class is
        self._table: dict[str, object] = cast("Any", quantization_config).table
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> PreTrainedModel:
        prepare(model, self._table)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> PreTrainedModel:
        complete(model, self._table, model.dtype)
        take_over_saving(model)
        # it is an ordinary model from here on: casts are allowed
        cast("Any", model).is_quantized = False
        return model

    # what follows is not annotated in the base class, which then seems to return None

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_compileable(self) -> bool:
        return True
