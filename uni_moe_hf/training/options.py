"""Options of the scripts: what all three stages share, and what each has besides."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import ScriptArguments

from ..hub.processing_uni_moe import UniMoEProcessor
from .data import UniMoEDataCollator
from .row_files import load_rows


@dataclass
class StageArguments(ScriptArguments):
    r"""
    TRL's `ScriptArguments`, and what training on rows with media needs besides.

    Args:
        media_root (`str`, *optional*): Folder that relative paths in the data start from.
        max_tokens (`int`, *optional*, defaults to 2048): Longest row, media included; `None` for no limit.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): As in [`UniMoEDataCollator`].
        group_by_modality (`bool`, *optional*, defaults to `False`): As in [`UniMoESFTTrainer`].
        learning_rates (`dict[str, float]` or `str`, *optional*): As in [`UniMoESFTTrainer`]; text is read as JSON.

    Raises:
        ValueError: `learning_rates` is text that is not a JSON object.
    """

    media_root: str | None = field(default=None, metadata={"help": "Folder that paths in the data start from."})
    max_tokens: int | None = field(default=2048, metadata={"help": "Longest row, media included."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Count rows that cannot be used instead of stopping."}
    )
    group_by_modality: bool = field(default=False, metadata={"help": "Steps of rows with the same modalities."})
    learning_rates: dict | str | None = field(
        default=None, metadata={"help": "Of parts with another one, such as '{\"audio connector\": 3e-5}'."}
    )

    def __post_init__(self) -> None:
        self.learning_rates = json_object("learning_rates", self.learning_rates)

    def rows(self) -> Dataset:
        """The rows to train on."""
        return load_rows(self.dataset_name, self.dataset_train_split)

    def sample(self, processor: UniMoEProcessor, count: int, batch_size: int = 8) -> Iterator[dict[str, Any]]:
        """Batches of `count` rows from all over the data, which may be sorted."""
        rows, collator = self.rows(), self.collator(processor)
        rows = rows.select(range(0, len(rows), -(-len(rows) // count)))
        for start in range(0, len(rows), batch_size):
            yield collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])

    def collator(self, processor: UniMoEProcessor) -> UniMoEDataCollator:
        """What makes batches of them for a model with this processor."""
        return UniMoEDataCollator(
            processor, max_length=self.max_tokens, media_root=self.media_root, skip_bad_rows=self.skip_bad_rows
        )


@dataclass
class PartsArguments:
    """What stage 1 builds a model from; see [`from_pretrained_parts`] and [`build_processor`]."""

    llm: str = field(metadata={"help": "Llama to start from, Hub id or folder."})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP or another vision backbone."})
    speech_tower: str | None = field(default=None, metadata={"help": "Whisper."})
    audio_tower: str | None = field(default=None, metadata={"help": "BEATs, as saved by this package."})
    image_size: int | None = field(default=None, metadata={"help": "Of pictures in pixels; else the tower's own."})
    num_speech_query_tokens: int = field(default=50, metadata={"help": "Tokens of a window of speech."})
    num_audio_query_tokens: int = field(default=50, metadata={"help": "Tokens of a window of sound."})
    audio_connector_config: dict | str | None = field(default=None, metadata={"help": "Of the Q-Former, as JSON."})
    chat_template: str | None = field(default=None, metadata={"help": "Jinja file in place of Vicuna's template."})

    def __post_init__(self) -> None:
        self.audio_connector_config = json_object("audio_connector_config", self.audio_connector_config)


@dataclass
class ExpertArguments:
    """What stage 2 trains an expert for; see [`prepare_stage`]."""

    model_name_or_path: str = field(metadata={"help": "What stage 1 left."})
    modalities: list[str] = field(metadata={"help": "The expert's: image, video, audio, speech."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the expert; products are scaled by alpha / rank."})


@dataclass
class MixtureArguments:
    """What stage 3 grows a mixture from; see [`grow_experts`]."""

    model_name_or_path: str = field(metadata={"help": "What stage 1 left."})
    experts: list[str] = field(metadata={"help": "name=adapter folder, or name= for the plain LLM's network."})
    projectors: list[str] = field(default_factory=list, metadata={"help": "modality=expert whose projector to keep."})
    shared_base: bool = field(default=True, metadata={"help": "One frozen network for all experts."})
    layers: str = field(default="all", metadata={"help": "Which layers become sparse: all or even."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    balance_rows: int = field(default=64, metadata={"help": "Rows on which the new routers are balanced."})
    expert_activations: str = field(default="save", metadata={"help": "Kept for backward: save, or recompute."})


def json_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    An option that is an object, or its JSON.

    Raises:
        ValueError: it is other text.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f'`{name}` is {value!r}, which is no JSON ({error}); write {{"key": value}}.') from error
    if not isinstance(found, dict):
        raise ValueError(f'`{name}` is {value!r}, which is JSON but no object; write {{"key": value}}.')
    return found


__all__ = ["ExpertArguments", "MixtureArguments", "PartsArguments", "StageArguments", "json_object"]
