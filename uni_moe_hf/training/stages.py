"""
The three training stages as data: what each trains, with which LoRA, and at what learning rate.

`prepare_stage` freezes a model accordingly and gives the `peft_config` for TRL's `SFTTrainer`, whose own checkpoints,
resuming and merging then apply.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..hub.configuration_uni_moe import is_sparse
from ..hub.expert_kernels_uni_moe import is_quantised
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..mixtures.expert_adapters import CONNECTORS


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    r"""
    One stage of the recipe. Patterns are regular expressions over whole module names.

    Args:
        name (`str`): "connectors", "experts" or "moe".
        connector_part (`str`): What is trained of each chosen connector: `""` for all of it, `".projector"`.
        lora_targets (`str`): Linear layers that get LoRA; empty for none.
        trained_modules (`tuple[str, ...]`): Modules trained in full besides the connectors.
        lora_rank, lora_alpha, lora_dropout: Of that LoRA.
        learning_rate (`float`): The paper's.
        sparse_parent (`bool`): Whether the stage starts from a mixture of experts or from a dense model.
        parents (`tuple[str | None, ...]`): Stages that may come before; `None` for none.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 4.4 and table 2; stage 3 as in
    `*/train/train.py@f5e82dd`.
    """

    name: str
    connector_part: str
    learning_rate: float
    lora_targets: str = ""
    trained_modules: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    sparse_parent: bool = False
    parents: tuple[str | None, ...] = (None, "connectors")


STAGES = {
    "connectors": Stage("connectors", connector_part="", learning_rate=2e-5),
    "experts": Stage(
        "experts",
        connector_part=".projector",
        learning_rate=4e-5,
        lora_targets=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|gate_up|down)_proj",
        lora_rank=64,
        lora_dropout=0.05,
    ),
    "moe": Stage(
        "moe",
        connector_part=".projector",
        learning_rate=4e-5,
        lora_targets=r"model\.language_model\.layers\.\d+\.self_attn\.\w*proj\w*",
        trained_modules=(
            r"model\.language_model\.layers\.\d+\.mlp\.gate",
            r"model\.language_model\.layers\.\d+\.mlp\.experts\.lora",
        ),
        lora_rank=8,
        lora_dropout=0.05,
        sparse_parent=True,
        parents=(None, "connectors", "experts", "moe"),
    ),
}


def prepare_stage(
    model: UniMoEForConditionalGeneration, stage: str, modalities: Iterable[str] | None = None, **lora: Any
) -> Any:
    r"""
    Freezes what a stage does not train, and makes what it trains float32: in half precision, updates smaller than its
    rounding are lost, and at the paper's learning rates that is most of them.

    Args:
        model ([`UniMoEForConditionalGeneration`]): The stage's parent: dense for "connectors" and "experts", sparse
            for "moe".
        stage (`str`): "connectors", "experts" or "moe".
        modalities (`Iterable[str]`, *optional*): Whose connectors are trained: "image", "video", "audio", "speech";
            all that the model has by default. A stage-2 expert names its own.
        lora: Overrides of the stage's LoRA (`r`, `lora_alpha`, `lora_dropout`).

    Returns:
        `peft.LoraConfig` for `SFTTrainer(peft_config=...)`, which records the stage in the adapter; `None` for
        "connectors", which trains modules of the model itself.

    Raises:
        ValueError: an unknown stage or modality, the wrong parent, a pattern that matches nothing, or quantised
            modules to train in full.
        ImportError: PEFT is needed and missing.
    """
    if stage not in STAGES:
        raise ValueError(f"There is no stage {stage!r}; the stages are {list(STAGES)}.")
    plan, config = STAGES[stage], model.config
    if plan.sparse_parent != is_sparse(config.text_config):
        wanted, found = ("sparse", "dense") if plan.sparse_parent else ("dense", "sparse")
        remedy = "grow experts with `grow_experts` first" if plan.sparse_parent else "start from a stage-1 model"
        raise ValueError(f"Stage '{stage}' starts from a {wanted} model but this one is {found}; {remedy}.")
    # A model may be prepared again before it is trained: what counts is what it came with.
    parent = getattr(model, "_stage_before", config.stage)
    if parent not in plan.parents:
        raise ValueError(
            f"Stage '{stage}' follows {' or '.join(repr(name) for name in plan.parents if name)}, but this model has "
            f"had '{parent}'; load what stage 1 left."
        )
    if stage == "experts" and parent is None and config.modalities:
        logger.warning("The connectors of this model have had no stage 1: experts would learn from random features.")
    if modalities is None or isinstance(modalities, str):
        modalities = config.modalities if modalities is None else [modalities]
    modalities = list(modalities)
    if unknown := [modality for modality in modalities if modality not in config.modalities]:
        raise ValueError(f"This model has no tower for {unknown}; it takes text and {list(config.modalities)}.")

    connectors = dict.fromkeys(CONNECTORS[modality] for modality in modalities)
    if not connectors and not plan.lora_targets:
        raise ValueError(f"Stage '{stage}' trains nothing but connectors, and there are none for {modalities}.")
    patterns = [rf"model\.{connector}_connector{re.escape(plan.connector_part)}" for connector in connectors]
    trained = [name for pattern in (*patterns, *plan.trained_modules) for name in _matching(model, pattern)]
    if plan.lora_targets:
        _matching(model, plan.lora_targets)
    if quantised := [name for name in trained if any(map(is_quantised, model.get_submodule(name).parameters()))]:
        raise ValueError(
            f"Stage '{stage}' trains {quantised[:3]} in full but they are quantised; load the model with these among "
            "the modules that are not to be converted."
        )
    peft_config = _lora_config(plan, trained, lora) if plan.lora_targets else None

    # From here on the model is changed.
    for module in map(model.get_submodule, trained):
        if {torch.bfloat16, torch.float16} & {parameter.dtype for parameter in module.parameters()}:
            module.float()
    model.requires_grad_(False)
    model._stage_before = parent
    config.stage = stage  # what is saved says which training it has had
    if peft_config is None:
        for name in trained:
            model.get_submodule(name).requires_grad_(True)
    return peft_config


def _lora_config(plan: Stage, trained: list[str], lora: dict[str, Any]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(f"Stage '{plan.name}' trains LoRA with PEFT: `pip install uni-moe-hf[train]`.") from error
    settings = {"r": plan.lora_rank, "lora_alpha": plan.lora_alpha, "lora_dropout": plan.lora_dropout} | lora
    if unknown := sorted(set(settings) - set(LoraConfig.__dataclass_fields__)):
        raise ValueError(f"PEFT's LoraConfig has no {unknown}; the rank is called `r`.")
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=plan.lora_targets,
        modules_to_save=trained,
        auto_mapping={"stage": plan.name},  # a field that PEFT saves as it is where the task is known
        **settings,
    )


def moe_lora_config(
    model: UniMoEForConditionalGeneration, modalities: Iterable[str] | None = None, **lora: Any
) -> Any:
    """
    `prepare_stage(model, "moe", ...)`: stage 3 as one adapter of attention LoRA, expert LoRA, routers and projectors.

    Args:
        model, modalities, lora: As in [`prepare_stage`].

    Returns:
        `peft.LoraConfig` for `SFTTrainer(peft_config=...)`.
    """
    return prepare_stage(model, "moe", modalities, **lora)


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the modules that a pattern means; at least one."""
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if not names:
        raise ValueError(f"No module of the model matches '{pattern}', so the stage would train nothing there.")
    return names


PARTS = {
    "vision tower": r"vision_tower\.",
    "speech tower": r"speech_tower\.",
    "audio tower": r"audio_tower\.",
    "vision connector": r"vision_connector\.",
    "speech connector": r"speech_connector\.",
    "audio connector": r"audio_connector\.",
    "attention": r"\.self_attn\.",
    "routers": r"\.mlp\.gate\.",
    "expert LoRA": r"\.mlp\.experts\.lora\.",
    "expert bases": r"\.mlp\.experts\.",
    "dense FFN": r"\.mlp\.",
    "embeddings, norms, head": r"",
}


def part_of(parameter: str) -> str:
    """
    Args:
        parameter (`str`): Its name in a model, wrapped by PEFT or not.

    Returns:
        `str`: the part of the model that it belongs to, a key of `PARTS`.
    """
    return next(part for part, pattern in PARTS.items() if re.search(pattern, parameter))


def stage_table(model: nn.Module, learning_rate: float, learning_rates: Mapping[str, float] | None = None) -> str:
    """
    Args:
        model (`nn.Module`): Prepared, wrapped by PEFT or not.
        learning_rate (`float`): To print beside what is trained.
        learning_rates (`dict[str, float]`, *optional*): Of parts with another one.

    Returns:
        `str`: one line per part of the model, with its trainable and frozen parameters.
    """
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # what PEFT keeps beside its copy is no part of the model
            continue
        counts[part_of(name)][0 if parameter.requires_grad else 1] += parameter.numel()
    rows = [f"{'part':<26}{'trainable':>14}{'frozen':>16}{'lr':>12}"]
    for part, (trainable, frozen) in counts.items():
        if trainable or frozen:
            rate = (learning_rates or {}).get(part, learning_rate) if trainable else "-"
            rows.append(f"{part:<26}{trainable:>14,}{frozen:>16,}{rate:>12}")
    return "\n".join(rows)


__all__ = ["STAGES", "Stage", "moe_lora_config", "part_of", "prepare_stage", "stage_table"]
