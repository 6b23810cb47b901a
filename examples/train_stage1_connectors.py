# /// script
# dependencies = ["uni-moe-hf[train]"]
# ///
"""
Stage 1: join an LLM and encoders, and train the connectors between them on captions and transcripts.

accelerate launch examples/train_stage1_connectors.py \
    --config examples/configs/stage1_connectors.yaml \
    --llm lmsys/vicuna-7b-v1.5 \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --speech_tower openai/whisper-small \
    --dataset_name data/captions.jsonl \
    --output_dir outputs/stage1

Leaves a dense Uni-MoE with trained connectors in `output_dir`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, set_seed
from trl import ScriptArguments, SFTConfig, TrlParser

from uni_moe_hf import (
    UniMoEDataCollator,
    UniMoESFTTrainer,
    build_processor,
    from_pretrained_parts,
    last_complete_checkpoint,
    load_rows,
    prepare_stage,
)
from uni_moe_hf.training.stages import stage_table


@dataclass
class PartsArguments:
    llm: str = field(metadata={"help": "Llama to start from, Hub id or folder."})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP or another vision backbone."})
    speech_tower: str | None = field(default=None, metadata={"help": "Whisper."})
    audio_tower: str | None = field(default=None, metadata={"help": "BEATs, as saved by this package."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of pictures in pixels; the tower's own by default."}
    )
    num_speech_query_tokens: int = field(default=50, metadata={"help": "Tokens of a window of speech."})
    num_audio_query_tokens: int = field(default=50, metadata={"help": "Tokens of a window of sound."})
    audio_connector_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of the Q-Former, as JSON; the released size by default."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Jinja file in place of Vicuna's template."})
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
        if isinstance(self.learning_rates, str):
            self.learning_rates = json.loads(self.learning_rates)
        if isinstance(self.audio_connector_config, str):
            self.audio_connector_config = json.loads(self.audio_connector_config)


def main(script_args: ScriptArguments, training_args: SFTConfig, parts: PartsArguments) -> None:
    set_seed(training_args.seed)  # before anything starts at random: the trainer's own call comes after that

    ################
    # Model & processor
    ################
    model = from_pretrained_parts(
        parts.llm,
        vision_tower=parts.vision_tower,
        speech_tower=parts.speech_tower,
        audio_tower=parts.audio_tower,
        num_speech_query_tokens=parts.num_speech_query_tokens,
        num_audio_query_tokens=parts.num_audio_query_tokens,
        audio_connector_config=parts.audio_connector_config,
    )
    template = None if parts.chat_template is None else Path(parts.chat_template).read_text(encoding="utf-8")
    processor = build_processor(
        model.config,
        AutoTokenizer.from_pretrained(parts.llm),
        image_processor=parts.vision_tower,
        image_size=parts.image_size,
        chat_template=template,
    )
    prepare_stage(model, "connectors")

    ################
    # Data
    ################
    dataset = load_rows(script_args.dataset_name, script_args.dataset_train_split)
    collator = UniMoEDataCollator(
        processor, max_length=parts.max_tokens, media_root=parts.media_root, skip_bad_rows=parts.skip_bad_rows
    )

    ################
    # Training
    ################
    resume = training_args.resume_from_checkpoint
    if resume == "last":  # that was saved whole; none at the first start
        resume = last_complete_checkpoint(training_args.output_dir)
    trainer = UniMoESFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=collator,
        learning_rates=parts.learning_rates,
        group_by_modality=parts.group_by_modality,
    )
    trainer.accelerator.print(stage_table(trainer.model, training_args.learning_rate, parts.learning_rates))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(args: list[str] | None = None) -> tuple[ScriptArguments, SFTConfig, PartsArguments]:
    return TrlParser((ScriptArguments, SFTConfig, PartsArguments)).parse_args_and_config(args)


if __name__ == "__main__":
    main(*parse())
