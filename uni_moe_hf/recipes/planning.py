"""
Estimates of what a stage of training needs: memory, and arithmetic. No weights are loaded.

Memory has four parts: weights; gradients and the optimiser's states of what is trained; what forward keeps for
backward; what is in work at once. The first two are counted on an empty model. The third follows from what each module
keeps, as `modeling_tests/training/test_planning.py` counts it; `benchmarks/bench_memory.py` compares the sum with
measured peaks.

Letters: N tokens of a batch, H hidden, I intermediate, Q and KV widths of queries and of keys, K experts per token,
R LoRA rank; e bytes of a number in the model's dtype, 4 of one in float32.
"""

import copy
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..hub.configuration_uni_moe import UniMoEConfig, is_sparse
from ..hub.experts_uni_moe import UniMoESparseMoeBlock
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..training.stages import STAGES, part_of, prepare_stage


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of a weight in bitsandbytes' NF4: 4 bits, and a float32 scale for every 64.
BYTES_4BIT = 0.5 + 4 / 64
# Adam's two moments and the gradient, float32 whatever the model's dtype.
BYTES_TRAINED = 12
# A tile of logits that TRL's head computes at once: tokens, words.
TILE = (4096, 32768)
# On a CPU, measured: what Python, torch and the libraries of training take before there is a model; what oneDNN keeps
# of compiled kernels, and for each sparse layer more, as every number of rows that an expert meets is a kernel.
LIBRARIES = 0.55e9
KERNELS = 0.1e9
KERNELS_PER_SPARSE_LAYER = {"float32": 12e6, "bfloat16": 22e6, "float16": 22e6}


@dataclass(frozen=True)
class StagePlan:
    """
    Memory in bytes, and arithmetic, of one process that trains a stage.

    Args:
        stage (`str`): "connectors", "experts" or "moe".
        weights (`int`): Of the whole model, or without its towers.
        trained (`int`): Gradients and optimiser states of what is trained.
        kept (`int`): What forward keeps for backward.
        working (`int`): What is in memory for a moment, at most.
        parameters (`int`): All of the model.
        trained_parameters (`int`): Those that are trained.
        flops (`float`): Floating-point operations of a batch, forward and backward.
        runtime (`int`): On a CPU: Python, libraries and compiled kernels. On a GPU 0, besides what the driver takes.
    """

    stage: str
    weights: int
    trained: int
    kept: int
    working: int
    parameters: int
    trained_parameters: int
    flops: float
    runtime: int

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return self.weights + self.trained + self.kept + self.working + self.runtime


def plan_stage(
    config: UniMoEConfig,
    stage: str,
    batch_size: int = 8,
    num_tokens: int = 512,
    dtype: str = "bfloat16",
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
    expert_activations: str = "save",
    without_towers: bool = False,
    num_experts: int = 4,
    shared_base: bool = True,
    lora_rank: int = 64,
    modalities: list[str] | None = None,
    num_answer_tokens: int = 64,
    clips: Mapping[str, float] | None = None,
    padded: bool = True,
    device: str = "cpu",
) -> StagePlan:
    r"""
    Args:
        config ([`UniMoEConfig`]): Of the dense model, or of a mixture, whose experts then count for stage "moe".
        stage (`str`): "connectors", "experts" or "moe".
        batch_size (`int`, *optional*, defaults to 8): Rows that one process computes at once.
        num_tokens (`int`, *optional*, defaults to 512): Of a row, media included.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): In which the model is loaded.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Whether the decoder's frozen linear layers are NF4.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): Whether layers keep their input alone.
        expert_activations (`str`, *optional*, defaults to `"save"`): Or `"recompute"`.
        without_towers (`bool`, *optional*, defaults to `False`): Whether towers leave the memory.
        num_experts (`int`, *optional*, defaults to 4): Of stage "moe", where the config is dense.
        shared_base (`bool`, *optional*, defaults to `True`): Of the same.
        lora_rank (`int`, *optional*, defaults to 64): Of the experts' LoRA.
        modalities (`list[str]`, *optional*): That a stage-2 expert is for; all by default.
        num_answer_tokens (`int`, *optional*, defaults to 64): Of a row, those that are learned.
        clips (`dict[str, float]`, *optional*): Modality -> clips in a row; by default one of each that the model
            takes.
        padded (`bool`, *optional*, defaults to `True`): Whether rows of a batch differ in length.
        device (`str`, *optional*, defaults to `"cpu"`): Or `"cuda"`, where dropout keeps a quarter of what it keeps on
            a CPU.

    Returns:
        [`StagePlan`].

    Raises:
        ValueError: there is no such stage, dtype, device or way to keep activations.
    """
    if stage not in STAGES:
        raise ValueError(f"There is no stage {stage!r}; the stages are {list(STAGES)}.")
    if dtype not in BYTES:
        raise ValueError(f"`dtype` is {dtype!r}; it must be one of {list(BYTES)}.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` is {device!r}; it must be 'cpu' or 'cuda'.")
    if expert_activations not in ("save", "recompute"):
        raise ValueError(f"`expert_activations` is {expert_activations!r}; it must be 'save' or 'recompute'.")
    model = _prepared(config, stage, num_experts, shared_base, lora_rank, modalities)
    size, tokens = BYTES[dtype], batch_size * num_tokens
    is_padded = padded and batch_size > 1
    weights = trained = parameters = 0.0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        is_tower = part_of(name).endswith("tower")
        parameters += 0 if ".original_module." in name else count  # what PEFT keeps beside its copy
        if parameter.requires_grad:
            trained += count
            weights += count * 4
        elif not (without_towers and is_tower):
            weights += count * (BYTES_4BIT if load_in_4bit and IN_4BIT.search(name) else size)
    layers = [module for name, module in model.named_modules() if LAYER.search(name)]
    kept_by = [
        _kept_by_layer(layer, model.config, batch_size, num_tokens, size, is_padded, expert_activations, device)
        for layer in layers
    ]
    text = model.config.get_text_config()
    inputs = tokens * text.hidden_size * size
    # Checkpointing keeps of every layer but the one in work its input alone.
    kept = inputs * len(layers) + max(kept_by) if gradient_checkpointing else sum(kept_by)
    counts = {name: batch_size * count for name, count in (clips or dict.fromkeys(config.modalities, 1.0)).items()}
    kept += _kept_by_connectors(model, counts)
    # Gradients of a layer's activations; a mixture sums those of all experts, and has buffers for the busiest.
    hidden, inner = (8, 10) if is_sparse(text) else (4, 3)
    working = tokens * (hidden * text.hidden_size + inner * text.intermediate_size) * size
    scored = min(batch_size * num_answer_tokens, TILE[0]) * min(text.vocab_size, TILE[1])
    working = max(working, scored * 4 * 4)
    if load_in_4bit:  # one layer's weights at a time
        working += text.hidden_size * text.intermediate_size * size
    if not without_towers:  # before anything is kept
        working = max(working, _working_in_towers(model.config, counts, size) - kept)
    return StagePlan(
        stage,
        weights=round(weights),
        trained=round(trained * BYTES_TRAINED),
        kept=round(kept),
        working=round(working),
        parameters=round(parameters),
        trained_parameters=round(trained),
        flops=_flops(model, batch_size, num_tokens, gradient_checkpointing),
        runtime=_runtime(dtype, text.mlp_layer_types.count("sparse")) if device == "cpu" else 0,
    )


# What one can choose between, from dear to cheap; the last two are of a mixture alone.
CHOICES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "bfloat16, checkpointing": {"gradient_checkpointing": True},
    "and without towers": {"gradient_checkpointing": True, "without_towers": True},
    "and the LLM in 4 bits": {"gradient_checkpointing": True, "without_towers": True, "load_in_4bit": True},
    "bfloat16, experts recompute": {"expert_activations": "recompute"},
    "bfloat16, checkpointing, own bases": {"gradient_checkpointing": True, "shared_base": False},
}


def plan_choices(config: UniMoEConfig, **settings: Any) -> dict[str, dict[str, StagePlan]]:
    """
    Args:
        config ([`UniMoEConfig`]): As in [`plan_stage`].
        settings: Of [`plan_stage`], for all choices.

    Returns:
        `dict[str, dict[str, StagePlan]]`: choice, a key of `CHOICES` -> stage -> what it needs.
    """
    found: dict[str, dict[str, StagePlan]] = {}
    for choice, options in CHOICES.items():
        stages = ["moe"] if {"expert_activations", "shared_base"} & {*options} else [*STAGES]
        found[choice] = {stage: plan_stage(config, stage, **{**settings, **options}) for stage in stages}
    return found


def seconds_per_batch(plan: StagePlan, device: str = "cpu", dtype: str = "float32") -> float:
    """
    A rough estimate: the plan's arithmetic at the speed of a large matrix product on this machine, of which a training
    step reaches a third.

    Args:
        plan ([`StagePlan`]): Of a stage.
        device (`str`, *optional*, defaults to `"cpu"`): Where it is trained.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the products.

    Returns:
        `float`: seconds of forward and backward. Small models take longer: their steps are all overhead.
    """
    side = 1024 if device == "cpu" else 8192
    square = torch.rand(side, side, device=device).to(getattr(torch, dtype))
    spent = []
    for _ in range(4):
        start = time.perf_counter()
        (square @ square).sum().item()
        spent.append(time.perf_counter() - start)
    return plan.flops / (2 * side**3 / min(spent)) * 3


# --- What is counted


# In the names of an empty model that PEFT has wrapped or not.
LAYER = re.compile(r"language_model\.layers\.\d+$")
IN_4BIT = re.compile(
    r"language_model\.layers\.\d+\.(self_attn|mlp)\.(?!gate\.|experts\.lora\.).*(?<!lora_[AB]\.default\.)weight$"
)


def _prepared(
    config: UniMoEConfig, stage: str, num_experts: int, shared_base: bool, lora_rank: int, modalities: Any
) -> nn.Module:
    """An empty model as the stage trains it."""
    config = copy.deepcopy(config)
    text = config.text_config
    if stage == "moe" and not is_sparse(text):
        text.mlp_layer_types = ["sparse"] * text.num_hidden_layers
        text.num_experts, text.num_experts_per_tok = num_experts, min(2, num_experts)
        text.expert_names, text.shared_expert_base, text.expert_lora_rank = None, shared_base, lora_rank
    elif stage != "moe":
        text.mlp_layer_types = ["dense"] * text.num_hidden_layers
    config.stage = {"connectors": None, "experts": "connectors", "moe": "connectors"}[stage]
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
        lora = {"r": lora_rank} if stage == "experts" else {}
        peft_config = prepare_stage(model, stage, modalities, **lora)
        return model if peft_config is None else get_peft_model(model, peft_config)


def _kept_by_layer(
    layer: nn.Module,
    config: UniMoEConfig,
    batch_size: int,
    num_tokens: int,
    size: int,
    is_padded: bool,
    expert_activations: str,
    device: str,
) -> float:
    """Bytes that a decoder layer keeps for backward."""
    text, tokens = config.text_config, batch_size * num_tokens
    heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    # Queries, keys, values and outputs of attention, the sums of its softmax; the mask, as numbers, and then keys and
    # values as often as there are heads.
    number = size * (2 * heads + 2 * (heads if is_padded else keys)) * head + 4 * heads
    number += size * num_tokens * is_padded
    if getattr(text, "attn_logit_softcapping", None):  # no kernel: every score, and its weight
        number += 8 * heads * num_tokens
    for name, module in layer.named_modules():
        if "norm" in type(module).__name__.lower():  # computed in float32
            per_head = {"q_norm": heads, "k_norm": keys}.get(name.rpartition(".")[2], 1)
            width = module.weight.numel()
            number += 4 * (width + 1) * (per_head if width == head else 1)
        elif hasattr(module, "lora_A"):  # rows after dropout in float32, what it dropped, and rows of low rank
            dropped = 4 if device == "cpu" else 1
            for first in module.lora_A.values():
                number += (4 + dropped) * first.in_features + 4 * first.out_features
    if not isinstance(layer.mlp, UniMoESparseMoeBlock):
        return tokens * (number + 3 * size * text.intermediate_size)
    routed, rank = text.num_experts_per_tok, text.expert_lora_rank
    number += size * text.hidden_size + (4 * text.hidden_size if size < 4 else 0)  # for experts and for the router
    number += 28 * routed + 4 * text.num_experts
    if expert_activations == "save":
        number += 3 * rank * routed * size
        number += 2 * size * text.intermediate_size * (1 if text.shared_expert_base else routed)
    factors = sum(each.numel() for each in layer.mlp.experts.parameters() if each.requires_grad)
    return tokens * number + (factors * size if size < 4 else 0)


def _runtime(dtype: str, num_sparse_layers: int) -> int:
    """Bytes of a process on a CPU that are no tensors."""
    return round(LIBRARIES + KERNELS + KERNELS_PER_SPARSE_LAYER[dtype] * num_sparse_layers)


def _kept_by_connectors(model: nn.Module, counts: Mapping[str, float]) -> float:
    """Bytes that connectors keep, where more of them than their projectors is trained."""
    config, total = model.config, 0.0
    for modality in ("speech", "audio"):
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        if not any(f"{modality}_connector." in name and "projector" not in name for name in names):
            continue
        tower, width, inner, layers = _sizes(getattr(config, f"{modality}_config"))
        queries = getattr(config, f"num_{modality}_query_tokens")
        qformer = getattr(config, f"{modality}_connector_config", None)
        if qformer is not None:
            width, inner, layers = qformer.hidden_size, qformer.intermediate_size, qformer.num_hidden_layers
        each = layers * 4 * (queries * (12 * width + 3 * inner) + tower * 3 * width)
        total += counts.get(modality, 0.0) * each
    return total


def _sizes(tower: Any) -> tuple[int, int, int, int]:
    """Positions of a clip, width, inner width and layers of a tower, or of what resembles it."""
    width = getattr(tower, "d_model", None) or getattr(tower, "hidden_size", None) or 768
    inner = getattr(tower, "encoder_ffn_dim", None) or getattr(tower, "intermediate_size", None) or 4 * width
    layers = getattr(tower, "encoder_layers", None) or getattr(tower, "num_hidden_layers", None) or 12
    if tower.model_type == "whisper":
        positions = tower.max_source_positions
    elif isinstance(side := getattr(tower, "image_size", None), int):
        positions = (side // (getattr(tower, "patch_size", None) or 32)) ** 2 + 1
    else:
        positions = 512  # ten seconds of BEATs, or nearly
    return positions, width, inner, layers


def _working_in_towers(config: UniMoEConfig, counts: Mapping[str, float], size: int) -> float:
    """Bytes of the widest tower at work: one layer's arithmetic, and of one for pictures the states of all layers."""
    total = 0.0
    towers = {"image": config.vision_config, "speech": config.speech_config, "audio": config.audio_config}
    for modality, tower in towers.items():
        if tower is not None and tower.model_type != "yamnet":  # convolutions, of next to nothing
            positions, width, inner, layers = _sizes(tower)
            states = 8 + (layers if tower is config.vision_config else 0)
            total = max(total, counts.get(modality, 0.0) * positions * size * (width * states + 2 * inner))
    return total


def _flops(model: nn.Module, rows: int, num_tokens: int, gradient_checkpointing: bool) -> float:
    """Two a weight and token forward, two more for gradients of what goes in, two for those of what is trained."""
    config, tokens = model.config, rows * num_tokens
    text, total = config.text_config, 0.0
    share = text.num_experts_per_tok / text.num_experts if is_sparse(text) else 1
    times = 6 if gradient_checkpointing else 4
    for name, weight in model.named_parameters():
        part = part_of(name)
        if part.endswith("tower"):
            total += 2 * weight.numel() * rows * _sizes(getattr(config, part.replace(" tower", "_config")))[0]
        elif weight.dim() > 1 and LAYER.search(re.sub(r"(layers\.\d+)\..*", r"\1", name)):
            routed = share if part == "expert LoRA" or (part == "expert bases" and weight.dim() == 3) else 1
            if part == "expert bases" and weight.dim() == 2:  # shared: gate and up once, down once
                routed = 1
            total += (times + 2 * weight.requires_grad) * weight.numel() * tokens * routed
    attention = 2 * num_tokens * text.num_attention_heads * (getattr(text, "head_dim", None) or 64)
    return total + times * attention * tokens * text.num_hidden_layers


__all__ = ["BYTES", "CHOICES", "LIBRARIES", "StagePlan", "plan_choices", "plan_stage", "seconds_per_batch"]
