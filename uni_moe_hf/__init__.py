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

# Public names, by the module that defines them. Hub files are imported at once, tools on first use.
_PUBLIC = {
    "evaluation.callback": ["GenerationCallback"],
    "evaluation.evaluation": ["evaluate"],
    "evaluation.tasks": ["load_task"],
    "hub.towers_uni_moe": ["BeatsModel", "YamnetModel"],
    "hub.configuration_uni_moe": ["BeatsConfig", "UniMoEConfig", "YamnetConfig"],
    "hub.feature_extraction_uni_moe": ["UniMoEFeatureExtractor", "YamnetFeatureExtractor"],
    "hub.generation_uni_moe": ["AnyToTextPipeline"],
    "hub.modeling_uni_moe": [
        "UniMoEForConditionalGeneration",
        "UniMoEModel",
        "UniMoEPreTrainedModel",
    ],
    "hub.processing_uni_moe": ["UniMoEProcessor"],
    "insight.card": ["complete_card"],
    "insight.connectors": ["connector_statistics"],
    "insight.live": ["LiveFiguresCallback", "RoutingFiguresCallback"],
    "insight.report": ["routing_report"],
    "mixtures.composition": ["from_pretrained_parts"],
    "mixtures.elastic_experts": ["add_expert", "clone_expert", "drop_expert", "merge_experts"],
    "mixtures.expert_adapters": ["export_expert", "export_expert_stack"],
    "mixtures.growing": ["grow_experts"],
    "mixtures.processors": ["build_processor"],
    "mixtures.routing": ["record_routing"],
    "mixtures.router_starts": ["balance_routers", "start_routers"],
    "original.conversion": ["convert_checkpoint", "revert_checkpoint"],
    "original.merging": ["merge_modalities"],
    "recipes.planning": ["plan_stage"],
    "training.checking": ["check_rows"],
    "training.data": ["UniMoEDataCollator"],
    "training.encoding": ["encode_rows"],
    "training.feature_cache": ["FeatureCache"],
    "training.options": ["StageArguments"],
    "training.resuming": ["last_complete_checkpoint"],
    "training.row_files": ["load_rows"],
    "training.rows": ["row_to_messages"],
    "training.spreading": ["spread"],
    "training.stages": ["moe_lora_config", "prepare_stage"],
    "training.trainer": ["UniMoESFTTrainer", "sft_config"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(["__version__", *_MODULE_OF])


def register() -> None:
    """Makes model, processor and pipeline known to the Auto classes; importing the package does it."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from .hub.configuration_uni_moe import BeatsConfig, UniMoEConfig, YamnetConfig
    from .hub.feature_extraction_uni_moe import UniMoEFeatureExtractor, YamnetFeatureExtractor
    from .hub.generation_uni_moe import AnyToTextPipeline
    from .hub.modeling_uni_moe import UniMoEForConditionalGeneration
    from .hub.processing_uni_moe import UniMoEProcessor
    from .hub.towers_uni_moe import BeatsModel, YamnetModel

    AutoConfig.register("uni_moe", UniMoEConfig, exist_ok=True)
    for name, config, model in (("beats", BeatsConfig, BeatsModel), ("yamnet", YamnetConfig, YamnetModel)):
        AutoConfig.register(name, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModel.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(UniMoEConfig, UniMoEProcessor, exist_ok=True)
    AutoFeatureExtractor.register(UniMoEConfig, UniMoEFeatureExtractor, exist_ok=True)
    AutoFeatureExtractor.register(YamnetConfig, YamnetFeatureExtractor, exist_ok=True)
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
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# The command `uni-moe` answers `--help` before anything heavy is imported, and registers when it has work to do.
if [Path(name).stem for name in sys.argv[:1]] != ["uni-moe"] and "uni_moe_hf.cli" not in sys.orig_argv[:4]:
    register()
