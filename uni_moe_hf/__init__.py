"""
Uni-MoE (https://huggingface.co/papers/2405.11273) for the Hugging Face libraries.

Importing this package registers the model, processor and pipeline with the Auto classes. The tools that build, train
and look into models are imported on first use, since they need more packages.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


__version__ = "0.1.0"

# Public name -> its module. The first group travels with checkpoints, the second are tools.
_MODULES = {
    "AnyToTextPipeline": "pipeline_uni_moe",
    "BeatsConfig": "configuration_uni_moe",
    "BeatsModel": "beats_uni_moe",
    "UniMoEConfig": "configuration_uni_moe",
    "UniMoEFeatureExtractor": "feature_extraction_uni_moe",
    "UniMoEForConditionalGeneration": "modeling_uni_moe",
    "UniMoEModel": "modeling_uni_moe",
    "UniMoEPreTrainedModel": "modeling_uni_moe",
    "UniMoEProcessor": "processing_uni_moe",
    "UniMoETextConfig": "configuration_uni_moe",
    "UniMoETextModel": "modeling_uni_moe",
    "UniMoEDataCollator": "data",
    "UniMoESFTTrainer": "training",
    "add_expert": "elastic_experts",
    "balance_routers": "elastic_experts",
    "build_processor": "composition",
    "check_rows": "data",
    "clone_expert": "elastic_experts",
    "connector_statistics": "routing",
    "convert_checkpoint": "conversion",
    "drop_expert": "elastic_experts",
    "export_expert": "expert_adapters",
    "export_expert_stack": "expert_adapters",
    "from_pretrained_parts": "composition",
    "grow_experts": "composition",
    "last_complete_checkpoint": "training",
    "load_rows": "row_files",
    "merge_experts": "elastic_experts",
    "merge_modalities": "merging",
    "moe_lora_config": "stages",
    "prepare_stage": "stages",
    "record_routing": "routing",
    "revert_checkpoint": "conversion",
    "row_to_messages": "data",
    "sft_config": "training",
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
    "UniMoESFTTrainer",
    "UniMoETextConfig",
    "UniMoETextModel",
    "__version__",
    "add_expert",
    "balance_routers",
    "build_processor",
    "check_rows",
    "clone_expert",
    "connector_statistics",
    "convert_checkpoint",
    "drop_expert",
    "export_expert",
    "export_expert_stack",
    "from_pretrained_parts",
    "grow_experts",
    "last_complete_checkpoint",
    "load_rows",
    "merge_experts",
    "merge_modalities",
    "moe_lora_config",
    "prepare_stage",
    "record_routing",
    "revert_checkpoint",
    "row_to_messages",
    "sft_config",
]


def register() -> None:
    """Makes model, processor and pipeline known to the Auto classes; importing the package does it."""
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
    from .modeling_uni_moe import UniMoEForConditionalGeneration, UniMoETextModel
    from .pipeline_uni_moe import AnyToTextPipeline
    from .processing_uni_moe import UniMoEProcessor

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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# The command `uni-moe` answers `--help` before anything heavy is imported, and registers when it has work to do.
if [Path(name).stem for name in sys.argv[:1]] != ["uni-moe"]:
    register()
