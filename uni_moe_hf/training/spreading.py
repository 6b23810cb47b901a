"""
Stage 3 over several processes by the library's own distribution, after PEFT has wrapped the model: experts with bases
of their own are spread by expert parallelism, everything else is sharded by FSDP2.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..hub.configuration_uni_moe import is_sparse


STATES = "optimizer"  # folder of a checkpoint with optimiser states that several processes wrote


def spread(model: nn.Module, expert_parallel_size: int = 1, fsdp_size: int | None = None) -> nn.Module:
    r"""
    Spreads a model over the processes of `torchrun`, in place. Each keeps its piece of the weights that it holds, and
    nothing is sent.

    Args:
        model (`nn.Module`): A mixture wrapped by PEFT as stage 3 trains it, the same in every process.
        expert_parallel_size (`int`, *optional*, defaults to 1): Processes that share the experts of a layer: a divisor
            of their number and of `fsdp_size`. 1 shards experts like everything else.
        fsdp_size (`int`, *optional*): Processes that share everything else; all by default.

    Returns:
        `nn.Module`: the model, for [`UniMoESFTTrainer`] without a `peft_config`.

    Raises:
        ValueError: the sizes do not fit the experts or the processes, experts share a base, or accelerate is to shard
            the model as well.
        ImportError: this release of transformers cannot do it.
    """
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ImportError("Sharding a model needs a newer transformers: `pip install -U transformers`.") from error
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    fsdp_size = processes if fsdp_size is None else fsdp_size
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text_config = base.config.get_text_config()
    _check_sizes(text_config, expert_parallel_size, fsdp_size, processes)
    if expert_parallel_size > 1:
        base.ep_plan = _plan_of_adapters(base.ep_plan)
    config = DistributedConfig(fsdp_size=fsdp_size, ep_size=expert_parallel_size)
    config, _, mesh = base.prepare_distribute_model(config)
    base.maybe_distribute_model(base, config, mesh)
    return model


def _check_sizes(text_config: Any, expert_parallel_size: int, fsdp_size: int, processes: int) -> None:
    for name, size in (("expert_parallel_size", expert_parallel_size), ("fsdp_size", fsdp_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`{name}={size!r}` must be a number of processes, 1 or more.")
    if fsdp_size != processes:
        raise ValueError(
            f"`fsdp_size={fsdp_size}` is not the number of processes, {processes}; start as many with torchrun."
        )
    if processes == 1:
        raise ValueError("A model is spread over several processes, and this is one; start them with torchrun.")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "accelerate is configured to shard the model (FSDP), which the library does here; start with torchrun, or "
            "with `ddp.yaml`."
        )
    if expert_parallel_size == 1:
        return
    if not is_sparse(text_config) or text_config.shared_expert_base:
        raise ValueError(
            f"`expert_parallel_size={expert_parallel_size}` spreads experts with bases of their own, and these share "
            "one, of which there is next to nothing to spread; leave it out, or grow them with `shared_base=False`."
        )
    for what, number in (("experts of each layer", text_config.num_experts), ("processes", fsdp_size)):
        if number % expert_parallel_size:
            raise ValueError(
                f"`expert_parallel_size={expert_parallel_size}` does not divide the {number} {what}; use a divisor."
            )


def _plan_of_adapters(plan: dict[str, str]) -> dict[str, str]:
    """PEFT keeps a module that it trains in full twice, as it was and as it is trained."""
    holders = ("original_module", "modules_to_save.default")
    changed = {}
    for name, how in plan.items():
        head, lora, tail = name.partition(".experts.lora")
        changed |= dict.fromkeys([f"{head}{lora}.{holder}{tail}" for holder in holders] if lora else [name], how)
    return changed


def is_spread(model: nn.Module) -> bool:
    """Whether [`spread`] or `from_pretrained(distributed_config=...)` has distributed a model."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters lie in pieces in several processes, whoever has cut them."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, whole, on the CPU; all processes together."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for n, p in trained}


def save_states(trainer: Trainer, folder: str) -> None:
    """Optimiser states in pieces, by parameter names, and the scheduler's; all processes together."""
    from transformers.distributed import save_optimizer_distributed

    save_optimizer_distributed(trainer.model, trainer.optimizer.optimizer, os.path.join(folder, STATES))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, "scheduler.pt"))


def load_states(trainer: Trainer, folder: str) -> None:
    """
    What [`save_states`] wrote, also with another number of processes.

    Raises:
        ValueError: the checkpoint is of a run that was not spread.
    """
    from transformers.distributed import load_optimizer_distributed

    check_states(folder, spread=True)
    load_optimizer_distributed(trainer.model, trainer.optimizer.optimizer, os.path.join(folder, STATES))
    trainer.lr_scheduler.load_state_dict(torch.load(os.path.join(folder, "scheduler.pt"), weights_only=True))


def check_states(folder: str, spread: bool) -> None:
    """
    Raises:
        ValueError: a checkpoint's optimiser states are of the other kind.
    """
    if any(Path(folder).glob("optimizer*")) and Path(folder, STATES).is_dir() != spread:
        was, now = ("was not", "is") if spread else ("was", "is not")
        raise ValueError(
            f"'{folder}' is of a run whose model {was} spread over processes, and this one's {now}: its optimiser "
            "states cannot be read. Go on as the run began, or begin a new one from its adapter."
        )


__all__ = [
    "check_states",
    "is_sharded",
    "is_spread",
    "load_states",
    "save_states",
    "spread",
    "trained_weights",
]
