# /// script
# dependencies = ["uni-moe-hf[train]"]
# ///
"""
Stage 3: grow a mixture from the stage-2 experts and train it on mixed data: LoRA on attention, the experts' LoRA,
routers and projectors.

accelerate launch examples/train_stage3_moe.py \
    --config examples/configs/stage3_moe.yaml \
    --model_name_or_path outputs/stage1 \
    --experts vision=outputs/stage2/vision/expert speech=outputs/stage2/speech/expert text= \
    --dataset_name data/mixed.jsonl \
    --output_dir outputs/stage3

`text=` without a folder is an expert that starts as the plain LLM. Leaves in `output_dir` one adapter with everything
that was trained, in `output_dir/grown` its parent, and in `output_dir/merged` the finished model, which loads alone.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoProcessor, set_seed
from trl import ScriptArguments, SFTConfig, TrlParser

from uni_moe_hf import (
    UniMoEDataCollator,
    UniMoEForConditionalGeneration,
    UniMoESFTTrainer,
    balance_routers,
    grow_experts,
    last_complete_checkpoint,
    load_rows,
    prepare_stage,
)
from uni_moe_hf.training.stages import stage_table


@dataclass
class MixtureArguments:
    model_name_or_path: str = field(metadata={"help": "What stage 1 left."})
    experts: list[str] = field(metadata={"help": "name=adapter folder, or name= for the plain LLM's network."})
    projectors: list[str] = field(
        default_factory=list, metadata={"help": "modality=expert whose projector to keep, where experts disagree."}
    )
    shared_base: bool = field(default=True, metadata={"help": "One frozen network for all experts."})
    layers: str = field(default="all", metadata={"help": "Which layers become sparse: all or even."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    balance_rows: int = field(default=64, metadata={"help": "Rows on which the new routers are balanced."})
    expert_activations: str = field(
        default="save", metadata={"help": "What experts keep for backward: save, or recompute for their input alone."}
    )
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


def pairs(items: list[str]) -> dict[str, str | None]:
    return {name: value or None for name, _, value in (item.partition("=") for item in items)}


def main(script_args: ScriptArguments, training_args: SFTConfig, mixture: MixtureArguments) -> None:
    set_seed(training_args.seed)  # before anything starts at random: the trainer's own call comes after that

    ################
    # Data
    ################
    processor = AutoProcessor.from_pretrained(mixture.model_name_or_path)
    dataset = load_rows(script_args.dataset_name, script_args.dataset_train_split)
    collator = UniMoEDataCollator(
        processor,
        max_length=mixture.max_tokens,
        media_root=mixture.media_root,
        skip_bad_rows=mixture.skip_bad_rows,
    )

    ################
    # Model
    ################
    output_dir = Path(training_args.output_dir)
    resume = training_args.resume_from_checkpoint
    if resume == "last":  # that was saved whole; none at the first start
        resume = last_complete_checkpoint(output_dir)
    grown = output_dir / "grown"
    # Routers start at random: every process, and a resumed run, must begin with the very same mixture.
    with training_args.main_process_first(desc="growing experts"):
        if not resume and training_args.process_index == 0:
            model = grow_experts(
                UniMoEForConditionalGeneration.from_pretrained(mixture.model_name_or_path),
                pairs(mixture.experts),
                shared_base=mixture.shared_base,
                layers=mixture.layers,
                num_experts_per_tok=mixture.num_experts_per_tok,
                projectors=pairs(mixture.projectors),
            )
            # A random router prefers some experts on every token; rows from all over the data set it right.
            rows = dataset.select(range(0, len(dataset), -(-len(dataset) // mixture.balance_rows)))
            batches = [collator([rows[n] for n in range(i, min(i + 8, len(rows)))]) for i in range(0, len(rows), 8)]
            balance_routers(model, batches)
            half_written = output_dir / "grown.partial"
            for folder in (grown, half_written):
                shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(half_written)
            processor.save_pretrained(half_written)
            half_written.rename(grown)
    model = UniMoEForConditionalGeneration.from_pretrained(grown)
    model.config.text_config.expert_activations = mixture.expert_activations
    peft_config = prepare_stage(model, "moe")

    ################
    # Training
    ################
    trainer = UniMoESFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=collator,
        peft_config=peft_config,
        learning_rates=mixture.learning_rates,
        group_by_modality=mixture.group_by_modality,
    )
    trainer.accelerator.print(stage_table(trainer.model, training_args.learning_rate, mixture.learning_rates))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    if trainer.accelerator.is_main_process:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(output_dir / "merged")
        processor.save_pretrained(output_dir / "merged")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(args: list[str] | None = None) -> tuple[ScriptArguments, SFTConfig, MixtureArguments]:
    return TrlParser((ScriptArguments, SFTConfig, MixtureArguments)).parse_args_and_config(args)


if __name__ == "__main__":
    main(*parse())
