"""What a quantisation leaves as it is, and what is refused because it would go wrong without a word."""

import copy
from itertools import product
from typing import Any

import torch
from transformers.quantizers import AutoQuantizationConfig


# Full names, as quantisers match them, in the model with its head and in the one without.
UNQUANTISED = [
    *("".join(parts) for parts in product(("", "model."), ("vision", "speech", "audio"), ("_tower", "_connector"))),
    "lm_head",
]


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a weight is none to compute with directly: torchao's hold `qdata`, bitsandbytes' are packed integers."""
    return any(hasattr(tensor, name) for name in ("qdata", "quant_state")) or not tensor.is_floating_point()


class QuantizationMixin:
    """Acts where a quantisation is asked for, and where a model is built whose config holds one."""

    @classmethod
    def from_pretrained(cls, *args, quantization_config: Any = None, **kwargs) -> Any:
        """As in the library; a quantisation that names no exceptions leaves alone what [`UNQUANTISED`] names."""
        config = kwargs.get("config")
        if quantization_config is None:
            quantization_config = getattr(config, "quantization_config", None)
        if quantization_config is not None:
            kwargs["quantization_config"] = _with_exceptions(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        """
        The library's, then the quantisation is looked at.

        Raises:
            ValueError: the method would leave the experts as they are, or put others in their place.
        """
        super().post_init()
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None or isinstance(quantization, dict):
            return
        text_config, method = self.config.get_text_config(), getattr(quantization.quant_method, "value", "")
        if text_config.is_sparse and not getattr(quantization, "dequantize", False):
            if method in ("fp8", "mxfp8"):
                if text_config.expert_lora_rank > 0:
                    raise ValueError(
                        f"Quantisation '{method}' puts experts of its own, without LoRA, in place of these; merge the "
                        "experts' LoRA first (`merge_expert_lora`), or quantise with torchao or bitsandbytes."
                    )
            elif not text_config.shared_expert_base and not _names_tensors(quantization):
                raise ValueError(
                    f"Quantisation '{method}' reaches linear layers only and would leave these experts' own bases, "
                    "most of the model, as they are; use a model with `shared_expert_base=True`, or name the stacks "
                    "in torchao's `FqnToConfig`."
                )


def _names_tensors(quantization: Any) -> bool:
    """torchao's `FqnToConfig` names tensors, stacks of experts among them; everything else looks for linear layers."""
    return hasattr(getattr(quantization, "quant_type", None), "fqn_to_config")


def _with_exceptions(quantization: Any) -> Any:
    """A copy that leaves alone towers and connectors, whose projectors the stages train, and the head."""
    quantization = copy.deepcopy(quantization)
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    fields = [name for name in ("modules_to_not_convert", "llm_int8_skip_modules") if hasattr(quantization, name)]
    if fields and all(getattr(quantization, name) is None for name in fields) and not _names_tensors(quantization):
        setattr(quantization, fields[0], list(UNQUANTISED))
    return quantization


__all__ = ["QuantizationMixin", "is_quantised"]
