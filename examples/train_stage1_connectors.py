# /// script
# dependencies = ["uni-moe-hf[train]"]
# ///
"""
Stage 1: join an LLM and encoders, and train the connectors between them on captions and transcripts.

accelerate launch examples/train_stage1_connectors.py \
    --config examples/configs/stage1_connectors.yaml \
    --llm Qwen/Qwen3-0.6B \
    --vision_tower google/siglip2-base-patch16-224 \
    --speech_tower openai/whisper-large-v3-turbo \
    --dataset_name data/captions.jsonl \
    --output_dir outputs/stage1

Leaves a dense Uni-MoE with trained connectors in `output_dir`.
"""

from transformers import set_seed
from trl import SFTConfig

from uni_moe_hf import GenerationCallback, LiveFiguresCallback, StageArguments, UniMoESFTTrainer, prepare_stage
from uni_moe_hf.training.options import PartsArguments, in_one_sentence, parse_options
from uni_moe_hf.training.stages import stage_table


def main(script_args: StageArguments, training_args: SFTConfig, parts: PartsArguments) -> None:
    set_seed(training_args.seed)  # before anything starts at random: the trainer's own call comes after that
    rows, eval_rows = script_args.splits(training_args)
    model, processor = parts.build(**script_args.loading())
    prepare_stage(model, "connectors")
    script_args.use_feature_cache(model, processor, training_args)
    trainer = UniMoESFTTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=script_args.collator(processor),
        learning_rates=script_args.learning_rates,
        group_by_modality=script_args.group_by_modality,
        modality_per_process=script_args.modality_per_process,
    )
    GenerationCallback.add_to(trainer, script_args.eval_generate)
    LiveFiguresCallback.add_to(trainer, script_args.live_figures)
    trainer.accelerator.print(stage_table(trainer.model, training_args.learning_rate, script_args.learning_rates))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"The dense model with trained connectors is in '{training_args.output_dir}'.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(args: list[str] | None = None) -> tuple[StageArguments, SFTConfig, PartsArguments]:
    return parse_options((StageArguments, SFTConfig, PartsArguments), args)


if __name__ == "__main__":
    with in_one_sentence():
        main(*parse())
