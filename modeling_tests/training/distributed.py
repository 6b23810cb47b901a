"""
What two processes compute together, for `test_distributed.py`:

    torchrun --nproc_per_node 2 distributed.py SCENARIO FOLDER

`FOLDER/model` is a saved model, `FOLDER/batch-RANK.pt` each process's batch. Leaves gradients and logits there.
"""

import faulthandler
import os
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny import labels_of
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from uni_moe_hf import UniMoEForConditionalGeneration, prepare_stage


SCENARIOS = {
    "fsdp": {"fsdp_size": 2},
    "adapter": {},  # sharded after PEFT has wrapped it, as accelerate does
    "experts": {"fsdp_size": 2, "ep_size": 2},
    "tensor_experts": {"tp_size": 2, "ep_size": 2},
}
# What is trained: names that match. Towers are frozen in every stage, so a process may leave them out.
TRAINED = {
    "fsdp": r"_connector\.",
    "experts": r"\.experts\.lora\.|\.mlp\.gate\.|_connector\.projector|language_model\..*\.self_attn\.",
    "tensor_experts": r"^$",
}


def prepare(model: torch.nn.Module, scenario: str) -> torch.nn.Module:
    """The same in one process and in two."""
    if scenario == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, prepare_stage(model, "moe", lora_dropout=0.0)).train()
        model.get_submodule("base_model.model.model.audio_connector.qformer").eval()  # without its dropout
        return model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(TRAINED[scenario], name) is not None)
    model.train()
    model.model.audio_connector.eval()  # without the Q-Former's dropout
    return model


def run(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Logits; gradients of the mean loss are left in the model."""
    outputs = model(**batch, labels=labels_of(model.config, batch))
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    return outputs.logits.detach()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(scenario: str, folder: Path) -> None:
    assert dist.get_world_size() == 2
    config = DistributedConfig(**SCENARIOS[scenario]) if SCENARIOS[scenario] else None
    model = UniMoEForConditionalGeneration.from_pretrained(folder / "model", distributed_config=config)
    model = prepare(model, scenario)
    if scenario == "adapter":
        for layer in model.get_submodule("base_model.model.model.language_model.layers"):
            fully_shard(layer)
        fully_shard(model)
    kinds = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    assert kinds, "nothing is sharded"
    if "experts" in scenario:
        assert any(".experts.lora." in name for name in kinds)
        local = next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj")).to_local()
        assert local.shape[0] == model.config.text_config.num_experts // 2
    batch = torch.load(folder / f"batch-{dist.get_rank()}.pt", weights_only=True)
    if scenario == "tensor_experts":
        model.eval()
        with torch.no_grad():
            logits = whole(run(model, batch))
    else:
        logits = whole(run(model, batch))
    torch.save(logits, folder / f"logits-{dist.get_rank()}.pt")
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing
    if dist.get_rank() == 0:
        torch.save(gradients, folder / "gradients.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # where it hangs, should it hang
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        main(sys.argv[1], Path(sys.argv[2]))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other process would be waited for
    os._exit(0)
