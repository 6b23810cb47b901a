"""
A first recipe for `uni-moe train`: what the parts and rows at hand, and the machine, suggest. `uni-moe init` writes
it, with a comment beside each choice.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import yaml

from ..hub.configuration_uni_moe import MODALITIES, UniMoEConfig
from ..hub.files_uni_moe import reason
from ..mixtures.composition import config_from_parts
from ..mixtures.parts import check_llm, read_part
from ..training.data import UniMoEDataCollator
from ..training.options import PartsArguments
from ..training.row_files import load_rows, spread_over
from ..training.rows import describe_row, row_modalities
from ..training.stages import STAGES
from .planning import StagePlan, plan_stage, seconds_per_batch


# Experts, and the modalities that each is for.
EXPERTS = {"vision": ("image", "video"), "audio": ("audio",), "speech": ("speech",)}
# The paper's: rows of an optimiser step, and epochs.
BATCHES = {"connectors": 32, "experts": 16, "moe": 8}
EPOCHS = {"connectors": 2, "experts": 1, "moe": 2}
# Small data are shown more often: optimiser steps below which a stage learns little, and the most epochs for it.
STEPS, MAX_EPOCHS = {"connectors": 400, "experts": 100, "moe": 200}, 20
# The width of the paper's LLM. Narrower ones take larger steps: by the quotient of widths, connectors by three times
# that; so were the rates that trained `examples/demo` (128 wide) and `examples/real_parts` (576 wide).
WIDTH = 4096
SAMPLE = 32  # rows whose tokens are counted
SHARE = 0.8  # of the free memory, for one stage


@dataclass(frozen=True)
class Draft:
    """
    Args:
        text (`str`): The recipe, as YAML with comments.
        plans (`dict[str, StagePlan]`): Stage -> what it needs.
        minutes (`dict[str, float]`): Stage -> a rough estimate; of "experts" for all of them.
        free (`int`): Bytes that are free on the machine.
    """

    text: str
    plans: dict[str, StagePlan]
    minutes: dict[str, float]
    free: int


@dataclass(frozen=True)
class _Given:
    """What a draft follows from: parts, rows and machine."""

    config: UniMoEConfig
    options: dict[str, Any]
    experts: dict[str, list[str]]
    kinds: Counter[str]
    num_rows: int
    num_tokens: int
    num_answer_tokens: int
    free: int
    dtype: str
    device: str

    @property
    def width(self) -> int:
        """Of the LLM."""
        return self.config.text_config.hidden_size

    @property
    def rank(self) -> int:
        """Of the experts' LoRA."""
        return 64 if self.width > 1024 else 16


def draft_recipe(
    parts: Mapping[str, str],
    data: str,
    test: str | None = None,
    task: str = "short-answers",
    output_dir: str = "outputs/mine",
) -> Draft:
    r"""
    Args:
        parts (`dict[str, str]`): "llm", and any of "vision_tower", "speech_tower" and "audio_tower": folders or Hub
            ids. No weights are read.
        data (`str`): Rows to train on, as in [`load_rows`].
        test (`str`, *optional*): Rows to evaluate on.
        task (`str`, *optional*, defaults to `"short-answers"`): What is asked of them; see `uni-moe evaluate --list`.
        output_dir (`str`, *optional*, defaults to `"outputs/mine"`): Where the training will write.

    Returns:
        [`Draft`].

    Raises:
        ValueError: a part cannot be one, the rows cannot be read, or they hold media that no part takes.
    """
    options = _part_options(parts)
    config = config_from_parts(options["llm"], **{name: each for name, each in options.items() if name != "llm"})
    processor = PartsArguments(**options).processor(config)
    rows = load_rows(data)
    kinds: Counter[str] = Counter()
    for row in rows:
        try:
            kinds.update({processor._ear(kind) for kind in row_modalities(row)[0]})
        except ValueError as error:
            raise ValueError(f"{describe_row(row)} cannot be used: {reason(error)}.") from error
    if foreign := [kind for kind in kinds if kind not in config.modalities]:
        tower = {"image": "vision", "video": "vision"}.get(foreign[0], foreign[0])
        raise ValueError(
            f"'{data}' holds {foreign[0]} in {kinds[foreign[0]]} rows, for which no part is given; name a "
            f"{tower} tower, or leave these rows out."
        )
    experts = {name: [each for each in heard if kinds[each]] for name, heard in EXPERTS.items()}
    experts = {name: heard for name, heard in experts.items() if heard}
    if not experts:
        raise ValueError(f"'{data}' holds no media, so there are no experts to train; plain text needs no Uni-MoE.")
    given = _Given(config, options, experts, kinds, len(rows), *_tokens(rows, processor), *_machine())
    plans, minutes, sections = _sized(given)
    text = _text(given, plans, minutes, sections, data, output_dir)
    if test is not None:
        asked = {"task": task, "data": test, "max_new_tokens": max(8, 2 * given.num_answer_tokens)}
        text += "\n" + _block(
            "Questions about rows held out, and the same with another row's media: what is left is guessed.",
            {"evaluation": asked},
        )
    return Draft(text, plans, minutes, given.free)


def _part_options(parts: Mapping[str, str]) -> dict[str, Any]:
    """Options of stage 1: the parts, and what suits their sizes."""
    options: dict[str, Any] = {name: str(part) for name, part in parts.items() if part is not None}
    if options.keys() == {"llm"}:
        raise ValueError("There is no tower: name a vision tower, a speech tower or an audio tower beside the LLM.")
    is_narrow = check_llm(read_part("language_model", options["llm"])).hidden_size <= 1024
    queries = 16 if is_narrow else 50
    if "speech_tower" in options:
        positions = getattr(read_part("speech_tower", options["speech_tower"]).kind, "max_target_positions", None)
        options |= {"num_speech_query_tokens": min(queries, positions or queries), "cut_speech_windows": True}
    if "audio_tower" in options:
        options["num_audio_query_tokens"] = queries
        width = getattr(read_part("audio_tower", options["audio_tower"]).kind, "hidden_size", None) or 768
        if is_narrow:
            width = max(64, min(256, width // 32 * 32))
            options["audio_connector_config"] = {"hidden_size": width, "intermediate_size": 4 * width}
            options["audio_connector_config"] |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    return options


def _tokens(rows: Any, processor: Any) -> tuple[int, int]:
    """Tokens of the longest of some rows, and of their longest answer."""
    collator = UniMoEDataCollator(processor, skip_bad_rows=True)
    longest, learned = 1, 1
    for index in spread_over(len(rows), SAMPLE):
        labels = collator([rows[index]])["labels"]
        longest, learned = max(longest, labels.shape[1]), max(learned, int((labels != -100).sum()))
    return longest, learned


def _machine() -> tuple[int, str, str]:
    """Bytes that are free where training would run, the dtype that suits it, and which device that is."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "bfloat16" if torch.cuda.is_bf16_supported() else "float32", "cuda"
    return psutil.virtual_memory().available, "float32", "cpu"


def _fitting(
    config: UniMoEConfig, stage: str, settings: Mapping[str, Any], free: float
) -> tuple[int, bool, StagePlan]:
    """Rows at once and whether layers are checkpointed: the most that fits, else the least that there is."""
    for checkpointing in (False, True):
        size = BATCHES[stage]
        while size:
            plan = plan_stage(config, stage, size, gradient_checkpointing=checkpointing, **settings)
            if plan.total <= SHARE * free:
                return size, checkpointing, plan
            size //= 2
    return 1, True, plan


def _rate(stage: str, width: int) -> float:
    if width >= WIDTH:
        return STAGES[stage].learning_rate
    rate = STAGES[stage].learning_rate * WIDTH / width * (3 if stage == "connectors" else 1)
    digits = 1 - math.floor(math.log10(rate))
    return round(rate, digits)


def _sized(given: _Given) -> tuple[dict[str, StagePlan], dict[str, float], dict[str, dict[str, Any]]]:
    """Plans and minutes of the stages, and the options of each stage or expert."""
    settings = {"num_tokens": given.num_tokens, "num_answer_tokens": given.num_answer_tokens, "dtype": given.dtype}
    settings |= {"lora_rank": given.rank, "device": given.device}
    settings["clips"] = {kind: count / given.num_rows for kind, count in given.kinds.items()}
    experts = {name: max(given.kinds[kind] for kind in heard) for name, heard in given.experts.items()}
    plans, minutes, sections = {}, dict.fromkeys(STAGES, 0.0), {}
    for stage in STAGES:
        more = {
            "experts": {"modalities": next(iter(given.experts.values()))},
            "moe": {"num_experts": len(experts) + 1},
        }
        size, checkpointing, plans[stage] = _fitting(given.config, stage, settings | more.get(stage, {}), given.free)
        seconds = seconds_per_batch(plans[stage], given.device, given.dtype) / size
        for name, count in (experts if stage == "experts" else {stage: given.num_rows}).items():
            wanted = math.ceil(STEPS[stage] * BATCHES[stage] / count)
            epochs = max(EPOCHS[stage], min(MAX_EPOCHS, wanted))
            minutes[stage] += epochs * count * seconds / 60
            sections[name] = {
                "learning_rate": _rate(stage, given.width),
                "num_train_epochs": epochs,
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": BATCHES[stage] // size,
                "gradient_checkpointing": checkpointing,
                # So that an interrupted stage loses a fifth of itself at most.
                "save_steps": max(10, min(1000, math.ceil(epochs * count / BATCHES[stage] / 5))),
            }
    return plans, minutes, sections


def _text(
    given: _Given,
    plans: Mapping[str, StagePlan],
    minutes: Mapping[str, float],
    sections: Mapping[str, dict[str, Any]],
    data: str,
    output_dir: str,
) -> str:
    """The recipe without its evaluation."""
    shared = {"dataset_name": data, "feature_cache": f"{output_dir}/features", "fill_feature_cache": True}
    shared |= {"dtype": given.dtype, "live_figures": True, "report_to": "none", "logging_steps": 10, "seed": 0}
    told = {stage: f"{plan.total / 1e9:.1f} GB, some {minutes[stage]:.0f} min here" for stage, plan in plans.items()}
    experts = {
        name: {"modalities": heard, "only_modalities": True, "lora_r": given.rank, **sections[name]}
        for name, heard in given.experts.items()
    }
    memory = f"{given.free / 1e9:.1f} GB of free {'GPU memory' if given.device == 'cuda' else 'memory'}"
    blocks = [
        _block(
            f"uni-moe train FILE. Written for {given.num_rows:,} rows ({_counted(given.kinds)}) of up to "
            f"{given.num_tokens} tokens, and a machine with {memory}. Options are those of the stages' scripts and of "
            "TRL's SFTConfig; what is not said is as in the paper.",
            {"output_dir": output_dir},
        ),
        _block(
            "What stage 1 joins. Fewer query tokens make a clip shorter, and what is said of it coarser.",
            {"parts": given.options},
        ),
        _block("For every stage. Features of the frozen towers are computed once and cached.", {"shared": shared}),
        _block(
            f"Stage 1: connectors alone. {told['connectors']}. Few rows are shown often: a stage takes some hundred "
            "steps before it has learned anything.",
            {"connectors": sections["connectors"]},
        ),
        _block(
            f"Stage 2: one expert after another, each on the rows that hold its modalities. {told['experts']} in all.",
            {"experts": experts},
        ),
        _block(
            f"Stage 3: the mixture; `text` is the plain LLM's network. {told['moe']}.",
            {"moe": {"experts": ["text", *experts], **sections["moe"]}},
        ),
    ]
    return "\n".join(blocks)


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kinds[kind]:,} with {kind}" for kind in MODALITIES if kinds[kind])


class _Dumper(yaml.SafeDumper):
    """Lists on one line."""


_Dumper.add_representer(list, lambda dumper, each: dumper.represent_sequence("tag:yaml.org,2002:seq", each, True))


def _block(comment: str, section: dict[str, Any]) -> str:
    """A section under its comment."""
    lines = textwrap.fill(comment, 100, initial_indent="# ", subsequent_indent="# ")
    return f"{lines}\n{yaml.dump(section, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)}"


__all__ = ["Draft", "draft_recipe"]
