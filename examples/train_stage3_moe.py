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

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoProcessor, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from uni_moe_hf import (
    GenerationCallback,
    LiveFiguresCallback,
    RoutingFiguresCallback,
    StageArguments,
    UniMoEForConditionalGeneration,
    UniMoESFTTrainer,
    grow_experts,
    last_complete_checkpoint,
    prepare_stage,
    start_routers,
)
from uni_moe_hf.mixtures.loading import load_whole
from uni_moe_hf.training.options import MixtureArguments, in_one_sentence, parse_options
from uni_moe_hf.training.resuming import only_run_in, what_changed, write_digests
from uni_moe_hf.training.spreading import is_sharded, spread
from uni_moe_hf.training.stages import stage_table


def pairs(items: list[str]) -> dict[str, str | None]:
    return {name: value or None for name, _, value in (item.partition("=") for item in items)}


def grow(
    script_args: StageArguments, mixture: MixtureArguments, rows: Dataset, folder: Path, device: torch.device
) -> None:
    """The mixture that stage 3 begins with, written whole or not at all."""
    processor = AutoProcessor.from_pretrained(mixture.model_name_or_path)
    model = grow_experts(
        load_whole(UniMoEForConditionalGeneration, mixture.model_name_or_path, **script_args.loading()),
        pairs(mixture.experts),
        shared_base=mixture.shared_base,
        layers=mixture.layers,
        num_experts_per_tok=mixture.num_experts_per_tok,
        projectors=pairs(mixture.projectors),
    )
    # A random router prefers some experts on every token, and knows nothing of what they are for.
    model.to(device)
    script_args.open_feature_cache(model, processor)
    start_routers(model, script_args.sample(rows, model, processor, mixture.router_rows), mixture.router_start)
    partial = folder.with_name("grown.partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    for part in (model, processor):
        part.save_pretrained(partial)
    write_digests(partial)
    partial.rename(folder)


def main(script_args: StageArguments, training_args: SFTConfig, mixture: MixtureArguments) -> None:
    set_seed(training_args.seed)  # before anything starts at random: the trainer's own call comes after that
    rows, eval_rows = script_args.splits(training_args)
    count, pieces = len(mixture.experts), mixture.expert_parallel_size
    if pieces > 1 and count % pieces:  # `spread` would say so after a long while
        raise ValueError(f"`expert_parallel_size={pieces}` does not divide the {count} experts; use a divisor.")
    output_dir = Path(training_args.output_dir)
    grown, resume = output_dir / "grown", training_args.resume_from_checkpoint
    if resume == "last":  # that was saved whole; none at the first start
        resume = last_complete_checkpoint(output_dir)
    if resume and (lost := what_changed(grown) if grown.is_dir() else "it is missing"):
        raise ValueError(f"'{resume}' goes on from '{grown}', which cannot be used: {lost}. Begin in a new folder.")
    # Routers start at random: every process, and a resumed run, must begin with the very same mixture.
    with training_args.main_process_first(desc="growing experts"):
        if not resume and training_args.process_index == 0:
            grow(script_args, mixture, rows, grown, training_args.device)
    model = load_whole(UniMoEForConditionalGeneration, grown, **script_args.loading())
    processor = AutoProcessor.from_pretrained(grown)
    model.config.text_config.expert_activations = mixture.expert_activations
    peft_config = prepare_stage(model, "moe")
    script_args.use_feature_cache(model, processor, training_args)
    if mixture.expert_parallel_size != 1 or mixture.fsdp_size is not None:
        set_seed(training_args.seed)  # every process keeps its piece of the same adapter
        model = spread(get_peft_model(model, peft_config), mixture.expert_parallel_size, mixture.fsdp_size)
        peft_config = None
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
    RoutingFiguresCallback.add_to(trainer, script_args.routing_figures)
    trainer.accelerator.print(stage_table(trainer.model, training_args.learning_rate, script_args.learning_rates))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    whole = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.is_main_process:
        if is_sharded(whole):  # pieces in several processes: what was saved is whole
            unset_hf_deepspeed_config()
            parent = load_whole(UniMoEForConditionalGeneration, grown, **script_args.loading())
            prepare_stage(parent, "moe")  # what was trained stays in float32
            whole = PeftModel.from_pretrained(parent, output_dir)
        merged = whole.merge_and_unload()
        merged.save_pretrained(output_dir / "merged")
        processor.save_pretrained(output_dir / "merged")
        print(f"The adapter is in '{output_dir}', the finished model in '{output_dir / 'merged'}'.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def parse(args: list[str] | None = None) -> tuple[StageArguments, SFTConfig, MixtureArguments]:
    return parse_options((StageArguments, SFTConfig, MixtureArguments), args)


if __name__ == "__main__":
    with in_one_sentence():
        options = parse()
        # Two runs in one folder would each grow a mixture there.
        with only_run_in(options[1].output_dir, options[1].process_index == 0):
            main(*options)
