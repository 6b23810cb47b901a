# /// script
# dependencies = ["uni-moe-hf[train]"]
# ///
"""
Stage 2, once per expert: LoRA on the feed-forward layers of the dense model, and the modality's projector.

accelerate launch examples/train_stage2_experts.py \
    --config examples/configs/stage2_experts.yaml \
    --model_name_or_path outputs/stage1 \
    --modalities speech \
    --dataset_name data/speech_questions.jsonl \
    --output_dir outputs/stage2/speech

Leaves trainer checkpoints and the adapter in `output_dir`, and in `output_dir/expert` an ordinary PEFT adapter of the
plain LLM with the projector beside it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoProcessor, set_seed
from trl import ScriptArguments, SFTConfig, TrlParser

from uni_moe_hf import (
    UniMoEDataCollator,
    UniMoEForConditionalGeneration,
    UniMoESFTTrainer,
    export_expert,
    last_complete_checkpoint,
    load_rows,
    prepare_stage,
)
from uni_moe_hf.training.stages import stage_table


@dataclass
class ExpertArguments:
    model_name_or_path: str = field(metadata={"help": "What stage 1 left."})
    modalities: list[str] = field(metadata={"help": "The expert's: image, video, audio, speech."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the expert; products are scaled by alpha / rank."})
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


def main(script_args: ScriptArguments, training_args: SFTConfig, expert: ExpertArguments) -> None:
    set_seed(training_args.seed)  # before anything starts at random: the trainer's own call comes after that

    ################
    # Model & processor
    ################
    model = UniMoEForConditionalGeneration.from_pretrained(expert.model_name_or_path)
    processor = AutoProcessor.from_pretrained(expert.model_name_or_path)
    lora = {"r": expert.lora_r, "lora_alpha": expert.lora_alpha}
    peft_config = prepare_stage(model, "experts", modalities=expert.modalities, **lora)

    ################
    # Data
    ################
    dataset = load_rows(script_args.dataset_name, script_args.dataset_train_split)
    collator = UniMoEDataCollator(
        processor, max_length=expert.max_tokens, media_root=expert.media_root, skip_bad_rows=expert.skip_bad_rows
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
        peft_config=peft_config,
        learning_rates=expert.learning_rates,
        group_by_modality=expert.group_by_modality,
    )
    trainer.accelerator.print(stage_table(trainer.model, training_args.learning_rate, expert.learning_rates))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    if trainer.accelerator.is_main_process:
        export_expert(training_args.output_dir, Path(training_args.output_dir) / "expert")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(args: list[str] | None = None) -> tuple[ScriptArguments, SFTConfig, ExpertArguments]:
    return TrlParser((ScriptArguments, SFTConfig, ExpertArguments)).parse_args_and_config(args)


if __name__ == "__main__":
    main(*parse())
