"""
Stage 3 with spread experts, in as many processes as there are, for `test_spreading.py`:

    torchrun --nproc_per_node N spread_training.py '{"folder": ..., "media": ..., ...}'

Every second batch has words alone. Leaves logs, what was trained, and the adapter.
"""

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model
from side_by_side import InOrder
from tiny import tiny_model, tiny_processor
from tiny_training import rows
from torch.distributed.tensor import DTensor
from transformers import set_seed

from uni_moe_hf import UniMoEDataCollator, last_complete_checkpoint, prepare_stage, sft_config, spread
from uni_moe_hf.hub import expert_kernels_uni_moe
from uni_moe_hf.training.spreading import trained_weights


def data() -> list[dict]:
    words = {"messages": [{"role": "user", "content": "hello what is it"}, {"role": "assistant", "content": "a bird"}]}
    seen = [row for row in rows(12) if len(row["messages"][0]["content"]) > 1]  # all but those of words alone
    return [row for start in range(0, 8, 2) for row in (*seen[start : start + 2], words, words)]


def main(folder: str, media: str, ep: int = 1, steps: int = 4, save: int = 0, resume: bool = False, **model) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    dtype, optim = getattr(torch, model.pop("dtype", "float32")), model.pop("optim", "sgd")
    settings = {"save_strategy": "steps", "save_steps": save} if save else {"save_strategy": "no"}
    args = sft_config(
        "moe",
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4 // processes,
        learning_rate=0.1 if optim == "sgd" else 1e-3,
        optim=optim,  # Adam makes whole steps of rounding errors
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        router_aux_loss_coef=0.0,
        **settings,
    )
    made = tiny_model({"shared_expert_base": False, **model}).to(dtype)
    for layer in made.model.language_model.layers:
        layer.mlp.gate.float()
    set_seed(0)
    peft_model = get_peft_model(made, prepare_stage(made, "moe", lora_dropout=0.0))
    if processes > 1:
        peft_model = spread(peft_model, ep)
        kinds = {name for name, parameter in peft_model.named_parameters() if isinstance(parameter, DTensor)}
        assert any("lora_A" in name for name in kinds) and any(".experts.lora." in name for name in kinds), kinds
        own = next(p for name, p in peft_model.named_parameters() if name.endswith("experts.down_proj"))
        assert own.to_local().shape[0] == 4 // processes, own.to_local().shape
    routes = []
    choose = expert_kernels_uni_moe.choose_route
    expert_kernels_uni_moe.choose_route = lambda *a: (routes.append(choose(*a)), routes[-1])[1]
    processor = tiny_processor(made.config)
    trainer = InOrder(
        model=peft_model,
        args=args,
        train_dataset=Dataset.from_list(data(), on_mixed_types="use_json"),
        processing_class=processor,
        data_collator=UniMoEDataCollator(processor, media_root=media),
    )
    trainer.model.get_submodule("base_model.model.model.audio_connector.qformer").register_forward_pre_hook(
        lambda module, _: module.eval() and None  # its dropout would differ
    )
    trainer.train(last_complete_checkpoint(folder) if resume else None)
    assert set(routes) == {"segmented"}, set(routes)
    trainer.save_model(folder)
    weights = trained_weights(trainer.model)
    if trainer.accelerator.is_main_process:
        Path(folder, "logs.json").write_text(json.dumps(trainer.state.log_history))
        torch.save(weights, Path(folder, "weights.pt"))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # where it hangs, should it hang
    torch.set_num_threads(1)
    try:
        main(**json.loads(sys.argv[1]))
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the other process would be waited for
    os._exit(0)
