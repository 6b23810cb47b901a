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

from pathlib import Path

from transformers import AutoProcessor, set_seed
from trl import SFTConfig

from uni_moe_hf import (
    GenerationCallback,
    LiveFiguresCallback,
    StageArguments,
    UniMoEForConditionalGeneration,
    UniMoESFTTrainer,
    export_expert,
    prepare_stage,
)
from uni_moe_hf.mixtures.loading import load_whole
from uni_moe_hf.training.options import ExpertArguments, in_one_sentence, parse_options
from uni_moe_hf.training.stages import stage_table


def main(script_args: StageArguments, training_args: SFTConfig, expert: ExpertArguments) -> None:
    set_seed(training_args.seed)  # before anything starts at random: the trainer's own call comes after that
    rows, eval_rows = script_args.splits(training_args)
    processor = AutoProcessor.from_pretrained(expert.model_name_or_path)
    script_args.check_modalities(rows, expert.modalities, processor)
    if expert.only_modalities:
        rows = script_args.only_with(rows, expert.modalities, processor)
        eval_rows = eval_rows and script_args.only_with(eval_rows, expert.modalities, processor)
    model = load_whole(UniMoEForConditionalGeneration, expert.model_name_or_path, **script_args.loading())
    lora = {"r": expert.lora_r, "lora_alpha": expert.lora_alpha}
    peft_config = prepare_stage(model, "experts", modalities=expert.modalities, **lora)
    script_args.use_feature_cache(model, processor, training_args)
    trainer = UniMoESFTTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=script_args.collator(processor),
        peft_config=peft_config,
        learning_rates=script_args.learning_rates,
        group_by_modality=script_args.group_by_modality,
        modality_per_process=script_args.modality_per_process,
    )
    GenerationCallback.add_to(trainer, script_args.eval_generate)
    LiveFiguresCallback.add_to(trainer, script_args.live_figures)
    trainer.accelerator.print(stage_table(trainer.model, training_args.learning_rate, script_args.learning_rates))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if trainer.accelerator.is_main_process:
        exported = export_expert(training_args.output_dir, Path(training_args.output_dir) / "expert")
        print(f"The adapter is in '{training_args.output_dir}', and as an expert for stage 3 in '{exported}'.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(args: list[str] | None = None) -> tuple[StageArguments, SFTConfig, ExpertArguments]:
    return parse_options((StageArguments, SFTConfig, ExpertArguments), args)


if __name__ == "__main__":
    with in_one_sentence():
        main(*parse())
