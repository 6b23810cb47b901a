"""
Uni-MoE (https://huggingface.co/papers/2405.11273) for the Hugging Face libraries.

Importing this package registers the model, processor and pipeline with the Auto classes. The tools that build and
train models are imported on first use, since they need more packages.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .beats_uni_moe import BeatsModel
from .configuration_uni_moe import BeatsConfig, UniMoEConfig, UniMoETextConfig
from .feature_extraction_uni_moe import UniMoEFeatureExtractor
from .modeling_uni_moe import UniMoEForConditionalGeneration, UniMoEModel, UniMoEPreTrainedModel, UniMoETextModel
from .pipeline_uni_moe import AnyToTextPipeline
from .processing_uni_moe import UniMoEProcessor


__version__ = "0.1.0"

AutoConfig.register("uni_moe", UniMoEConfig, exist_ok=True)
AutoConfig.register("uni_moe_text", UniMoETextConfig, exist_ok=True)
AutoConfig.register("beats", BeatsConfig, exist_ok=True)
AutoModel.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
AutoModel.register(UniMoETextConfig, UniMoETextModel, exist_ok=True)
AutoModel.register(BeatsConfig, BeatsModel, exist_ok=True)
AutoModelForMultimodalLM.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
AutoProcessor.register(UniMoEConfig, UniMoEProcessor, exist_ok=True)
AutoFeatureExtractor.register(UniMoEConfig, UniMoEFeatureExtractor, exist_ok=True)
if "any-to-text" not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        "any-to-text", pipeline_class=AnyToTextPipeline, pt_model=(AutoModelForMultimodalLM,), type="multimodal"
    )

# Saving these writes their code into the folder.
UniMoEConfig.register_for_auto_class()
UniMoEForConditionalGeneration.register_for_auto_class("AutoModel")
UniMoEFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
UniMoEProcessor.register_for_auto_class("AutoProcessor")

_TOOLS = {
    "build_model": "composition",
    "build_processor": "composition",
    "connector_statistics": "routing",
    "export_expert": "composition",
    "grow_experts": "composition",
    "load_rows": "data",
    "UniMoEDataCollator": "data",
    "prepare_stage": "stages",
    "record_routing": "routing",
    "row_to_messages": "data",
}

__all__ = [
    "AnyToTextPipeline",
    "BeatsConfig",
    "BeatsModel",
    "UniMoEConfig",
    "UniMoEDataCollator",
    "UniMoEFeatureExtractor",
    "UniMoEForConditionalGeneration",
    "UniMoEModel",
    "UniMoEPreTrainedModel",
    "UniMoEProcessor",
    "UniMoETextConfig",
    "UniMoETextModel",
    "__version__",
    "build_model",
    "build_processor",
    "connector_statistics",
    "export_expert",
    "grow_experts",
    "load_rows",
    "prepare_stage",
    "record_routing",
    "row_to_messages",
]


def __getattr__(name: str) -> Any:
    if name in _TOOLS:
        return getattr(import_module(f".{_TOOLS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
