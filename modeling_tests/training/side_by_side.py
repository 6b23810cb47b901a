"""
A few steps of training, in as many processes as there are, for `test_distributed.py`:

    accelerate launch --config_file FILE side_by_side.py FOLDER MEDIA BATCH_SIZE NUM_PROCESSES [CACHE]

Every second batch has words alone, so that with two processes one of them never sees media. Leaves losses and weights.
With FSDP in FILE, or DeepSpeed at its stage 3, parameters are really sharded. With CACHE features come from there, and
towers are not in memory.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tiny import tiny_model, tiny_processor
from tiny_training import rows
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler

from uni_moe_hf import FeatureCache, UniMoEDataCollator, UniMoESFTTrainer, prepare_stage, sft_config
from uni_moe_hf.training.spreading import trained_weights


class InOrder(UniMoESFTTrainer):
    """Rows as they stand."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def main(folder: Path, media: Path, batch_size: int, num_processes: int, cache: str | None = None) -> None:
    model = tiny_model({"shared_expert_base": True})
    words = {"messages": [{"role": "user", "content": "hello what is it"}, {"role": "assistant", "content": "a bird"}]}
    seen = [row for row in rows(12) if len(row["messages"][0]["content"]) > 1]  # all but those of words alone
    data = []
    for start in range(0, 8, 2):
        data += [*seen[start : start + 2], {"messages": words["messages"]}, {"messages": words["messages"]}]
    processor = tiny_processor(model.config)
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if is_deepspeed:  # without a GPU accelerate knows of no backend for it
        PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.NO)
    args = sft_config(
        "moe",
        folder,
        use_cpu=not is_deepspeed,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch_size,
        learning_rate=0.1,
        optim="sgd",  # Adam makes whole steps of rounding errors
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        router_aux_loss_coef=0.0,
    )
    is_sharding = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if is_sharding:  # from the type of several CPUs accelerate makes plain data parallelism
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    peft_config = prepare_stage(model, "moe", lora_dropout=0.0)
    if cache:
        processor.feature_cache = FeatureCache(cache, model, processor)
        model.model.unload_towers(f"{folder}/towers-{os.environ.get('RANK', 0)}.pt")
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(data, on_mixed_types="use_json"),
        processing_class=processor,
        data_collator=UniMoEDataCollator(processor, media_root=media),
        peft_config=peft_config,
    )
    assert trainer.accelerator.num_processes == num_processes
    trainer.model.base_model.model.model.audio_connector.qformer.register_forward_pre_hook(
        lambda module, _: module.eval() and None  # its dropout would differ
    )
    trainer.train()
    trainer.save_model(folder / "adapter")
    if is_deepspeed:
        plugin = trainer.accelerator.state.deepspeed_plugin
        is_cut = {hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()}
        assert is_cut == {plugin.zero_stage == 3}, (plugin.zero_stage, is_cut)
        weights = {}  # in pieces; those of the adapter are whole
    else:
        weights = trained_weights(trainer.model)
    if is_sharding:
        kinds = {type(parameter) for parameter in trainer.model.parameters()}
        assert kinds == {DTensor}, kinds
        assert trainer.accelerator.distributed_type == DistributedType.FSDP
    if trainer.accelerator.is_main_process:
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
        torch.save(weights, folder / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]), *sys.argv[5:])
