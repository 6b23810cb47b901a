"""
Training through TRL: what each stage's `SFTConfig` needs, learning rates by part, grouped batches, logs, resuming.

Plain `SFTTrainer` runs every stage with [`sft_config`]'s settings; [`UniMoESFTTrainer`] adds to it and reads and
writes the same checkpoints.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..hub.compat_uni_moe import same_permissions
from ..hub.configuration_uni_moe import is_sparse
from ..mixtures.routing import RoutingRecorder, RoutingReport, record_routing
from .data import NO_ROW, UniMoEDataCollator
from .feature_cache import FeatureCache, FeatureCacheError
from .feature_keys import encoder_of
from .model_card import trained_card
from .resuming import last_complete_checkpoint, only_run_in, write_digests
from .rows import row_modalities
from .spreading import check_states, is_spread, load_states, save_states, trained_weights
from .stages import PARTS, STAGES, part_of


logger = logging.get_logger(__name__)

# Media are read by our collator, row by row: TRL must neither tokenise nor cut them, accelerate not slice batches
# along a first dimension that media do not share, and the trainer not hide a loss that is no number.
REQUIRED = {
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "accelerator_config": {"dispatch_batches": False},
    "logging_nan_inf_filter": False,
}


def sft_config(stage: str, output_dir: str | Path, **settings: Any) -> SFTConfig:
    r"""
    Args:
        stage (`str`): "connectors", "experts" or "moe".
        output_dir (`str` or `Path`): For checkpoints.
        settings: Further fields of `SFTConfig`, which win over the paper's numbers.

    Returns:
        `SFTConfig` with the stage's learning rate, a cosine schedule, 3 % warm-up, no weight decay, and what training
        on media demands; without a GPU for the CPU, in float32.

    Raises:
        ValueError: there is no such stage, or a setting contradicts what media demand.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 4.4.
    """
    if stage not in STAGES:
        raise ValueError(f"There is no stage {stage!r}; the stages are {list(STAGES)}.")
    if wrong := [name for name, value in REQUIRED.items() if name in settings and not _holds(settings[name], value)]:
        raise ValueError(f"Training on media needs {', '.join(f'`{name}={REQUIRED[name]}`' for name in wrong)}.")
    paper = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0}
    paper |= {"learning_rate": STAGES[stage].learning_rate}
    if not torch.accelerator.is_available() and "use_cpu" not in settings:
        paper |= {"use_cpu": True, "bf16": False}
    for name, value in REQUIRED.items():
        settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
    config = SFTConfig(output_dir=str(output_dir), **{**paper, **settings})
    unset_hf_deepspeed_config()  # a model that is made from now on is whole, until a trainer cuts it up
    return config


def _holds(given: Any, required: Any) -> bool:
    """Whether a setting is what media demand; of a dictionary these fields alone count."""
    if not isinstance(given, dict):
        return given == required
    return all(given.get(name, value) == value for name, value in required.items())


def _check_config(config: SFTConfig) -> None:
    """
    Raises:
        ValueError: media demand other settings.
    """
    needed = [name for name in ("remove_unused_columns", "logging_nan_inf_filter") if getattr(config, name, False)]
    if not (getattr(config, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        needed.append("dataset_kwargs")
    if needed:
        wanted = ", ".join(f"`{name}={REQUIRED[name]}`" for name in needed)
        raise ValueError(f"Training on media needs {wanted}; make the config with `sft_config`.")


def _check_collators_business(config: SFTConfig) -> None:
    """
    Raises:
        ValueError: a setting says how rows are read, which our collator would not know.
    """
    given = [name for name in ("assistant_only_loss", "packing", "padding_free") if getattr(config, name, False)]
    given += ["completion_only_loss"] * (config.completion_only_loss is not None)
    given += ["max_length"] * (config.max_length not in (None, SFTConfig.__dataclass_fields__["max_length"].default))
    if given:
        raise ValueError(
            f"`{given[0]}` does nothing here: rows are read by UniMoEDataCollator, which learns what the assistant "
            "says and nothing else; its own `max_length` (`--max_tokens` of the scripts) cuts them."
        )


class UniMoESFTTrainer(SFTTrainer):
    r"""
    `SFTTrainer` with learning rates by part, batches of one mixture of modalities, and logs of what a mixture does.

    Logged besides TRL's own: `loss/<modalities>` for rows with these media, and with experts `load/<expert>`, its
    share of all tokens, and `load/max_over_min` of the most uneven layer, whatever the auxiliary loss;
    `specialisation/mean` and `/max` over layers, as in [`RoutingReport`]; and
    `rows_skipped` so far, where bad rows may be. They are counted on the device and read when the trainer logs.
    Evaluations have `eval_loss/<modalities>`.
    With a [`FeatureCache`] that is being filled, what the towers give is stored.

    Args:
        args: As `SFTTrainer`; without a `data_collator` rows of any form are read by a [`UniMoEDataCollator`].
        learning_rates (`dict[str, float]`, *optional*): Part of the model, a key of [`~stages.PARTS`] -> its rate.
        group_by_modality (`bool`, *optional*, defaults to `False`): Whether the rows of an optimiser step have the
            same modalities and similar lengths where possible; no row is dropped.
        modality_per_process (`bool`, *optional*, defaults to `False`): Whether each process has rows of the same
            modalities for as long as possible, and several have different ones, so that each runs the towers of one
            kind; no row is dropped (the paper's modality-level data parallelism).
        kwargs: As `SFTTrainer`.

    Raises:
        ValueError: a setting that media demand is missing, a part is unknown or not trained, or a loss is no number.
        OSError: the output folder cannot be written to, or a checkpoint could not be written whole.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[str, float] | None = None,
        group_by_modality: bool = False,
        modality_per_process: bool = False,
        **kwargs: Any,
    ):
        config = kwargs.get("args", args[1] if len(args) > 1 else None)
        if config is not None:
            _check_config(config)
        data = kwargs.get("train_dataset", args[3] if len(args) > 3 else None)
        if hasattr(data, "__len__") and not len(data):
            raise ValueError("The training data hold no rows.")
        if len(args) < 3 and kwargs.get("data_collator") is None:
            # TRL's own would read pictures alone, and learn placeholders.
            if not hasattr(kwargs.get("processing_class"), "image_token_id"):
                raise ValueError("Pass the model's processor as `processing_class`, or a `data_collator`.")
            kwargs["data_collator"] = UniMoEDataCollator(kwargs["processing_class"])
        collator = args[2] if len(args) > 2 else kwargs["data_collator"]
        if config is not None and isinstance(collator, UniMoEDataCollator):
            _check_collators_business(config)
        model = kwargs.get("model", args[0] if args else None)
        self._is_spread = isinstance(model, nn.Module) and is_spread(model)
        saves_states = config is not None and not config.save_only_model
        if self._is_spread and saves_states:
            config.save_only_model = True  # the library refuses optimiser states of such models here, and here alone
        super().__init__(*args, **kwargs)
        if self._is_spread and saves_states:
            self.args.save_only_model = False
        _check_config(self.args)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and not plugin.transformer_cls_names_to_wrap:
            # The decoder's layers alone: a process without pictures must not be waited for in the vision tower.
            layers = self.model.get_submodule(_name_of_decoder(self.model)).layers
            plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None and deepspeed.zero_stage == 3 and encoder_of(self.model).unloaded is None:
            encoder = encoder_of(self.model)
            encoder.to(self.accelerator.device)  # with its towers, which stay whole
            encoder.unload_towers(None)
        if self.args.should_save and not os.access(self.args.output_dir, os.W_OK):
            raise PermissionError(f"'{self.args.output_dir}' cannot be written to; choose another `output_dir`.")
        for parameter in self.model.parameters():
            # Over a base of 4 or 8 bits TRL makes what is trained bfloat16, where small updates are lost.
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        self.learning_rates = {part: float(rate) for part, rate in (learning_rates or {}).items()}
        if unknown := [part for part in self.learning_rates if part not in PARTS]:
            raise ValueError(f"There are no parts {unknown}; learning rates can be given for {list(PARTS)}.")
        if (group_by_modality or modality_per_process) and not hasattr(data, "__len__"):
            option = "group_by_modality" if group_by_modality else "modality_per_process"
            raise ValueError(f"`{option}` needs a whole data set; a stream is read in its own order.")
        if group_by_modality and modality_per_process:
            raise ValueError("`group_by_modality` and `modality_per_process` order rows in two ways; choose one.")
        self.group_by_modality, self.modality_per_process = group_by_modality, modality_per_process
        if isinstance(self.data_collator, UniMoEDataCollator):
            self.data_collator.describe_rows = True  # so that a bad batch can be named
        self.feature_cache: FeatureCache | None = getattr(
            getattr(self.data_collator, "processor", None), "feature_cache", None
        )
        if self.feature_cache is not None:
            self.feature_cache.check(self.model, self.data_collator.processor)
            if self.feature_cache.fill:
                self.add_callback(_WriteFeatures(self._flush))
        self._losses = ModalityLosses(self.model)
        self._routing: RoutingRecorder | None = None
        self.last_routing: RoutingReport | None = None  # what was counted between the last two logs
        self._skipped, self._batches, self._empty_batches = 0, 0, 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, its groups split by [`learning_rates`]."""
        optimizer = super().create_optimizer(*args, **kwargs)
        parts = {id(parameter): part_of(name) for name, parameter in self.model.named_parameters()}
        groups, used = [], set()
        for group in optimizer.param_groups:
            # The library keeps a group without parameters as well, and a checkpoint has as many as it was saved with.
            by_part: dict[str | None, list] = {} if group["params"] else {None: []}
            for parameter in group["params"]:
                part = parts[id(parameter)] if parts[id(parameter)] in self.learning_rates else None
                by_part.setdefault(part, []).append(parameter)
            for part, parameters in by_part.items():
                rate = self.learning_rates.get(part, group["lr"])
                groups.append({**group, "params": parameters, "lr": rate})
                used.add(part)
        if idle := set(self.learning_rates) - used:
            raise ValueError(f"{sorted(idle)} have learning rates but nothing of them is trained in this stage.")
        optimizer.param_groups[:] = groups
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not (self.group_by_modality or self.modality_per_process):
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        size, seed = self.args.train_batch_size, self.args.data_seed
        lanes = self.args.world_size if self.modality_per_process else 1
        if lanes == 1:  # a whole step of one kind
            size *= self.args.gradient_accumulation_steps * self.args.world_size
        return ModalityGroupedSampler(dataset, size, self.args.seed if seed is None else seed, lanes)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As in the library, counting losses and routes meanwhile.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As in the library; `"last"` is the last checkpoint
                that was saved whole, or the beginning where none was ever begun.
            kwargs: As in the library.
        """
        if resume_from_checkpoint == "last":
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        with ExitStack() as stack:
            stack.enter_context(only_run_in(self.args.output_dir, self.args.should_save))
            stack.enter_context(self._losses)
            if self.feature_cache is not None:
                stack.enter_context(self.feature_cache.collecting())
                stack.callback(self._flush)  # also where it is interrupted
            if is_sparse(self.model.config.get_text_config()):
                self._routing = stack.enter_context(record_routing(self.model))
            result = super().train(resume_from_checkpoint, **kwargs)
        if self._batches and self._empty_batches == self._batches:
            raise ValueError(
                f"Nothing was trained: no row of the {self._batches} batches could be used. `uni-moe data check` says "
                "why, or rows are longer than `max_length` of the collator."
            )
        return result

    def _flush(self) -> None:
        """Writes features that wait; what was learned is worth more than these."""
        try:
            self.feature_cache.flush()
        except OSError as error:
            logger.warning("%s", error)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the library; what callbacks generate is not counted among the routes of training."""
        with self._uncounted():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the library, with the loss by modalities; routes are not counted."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        with self._uncounted(), nullcontext() if self._losses.is_entered else self._losses:
            output = super().evaluation_loop(*args, **kwargs)
            losses = self._losses.read(self.accelerator, training=False)
        output.metrics.update({f"{prefix}_{name}": value for name, value in losses.items()})
        return output

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        was_paused = getattr(self._routing, "paused", None)
        if self._routing is None or was_paused:
            yield
            return
        self._routing.paused = True
        try:
            yield
        finally:
            self._routing.paused = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in TRL; stops at a loss that is no number, before it reaches a weight."""
        if self.feature_cache is not None:
            try:
                self.feature_cache.store(self.model, inputs)
            except FeatureCacheError as error:  # the batch has its features; what was learned is worth more
                logger.warning("Nothing more is stored in this run. %s", error)
                self.feature_cache.is_collecting = False
        rows = inputs.pop("rows", None)
        self._skipped += inputs.pop("num_skipped", 0)
        self._batches += self.model.training
        self._empty_batches += self.model.training and rows is not None and rows[0].startswith(NO_ROW)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        # TRL has just brought these to the host; the loss itself would have to be waited for.
        latest = [metrics[name][-1] for name in ("entropy", "aux_loss") if metrics.get(name)]
        if any(not math.isfinite(value) for value in latest):
            raise ValueError(
                f"The loss of step {self.state.global_step + 1} is no number; the batch was "
                f"{'; '.join(rows or ['not described'])}. Lower the learning rate, or look at these rows."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in TRL, with what was counted since the last time."""
        if "loss" in logs:
            logs |= self._losses.read(self.accelerator)
            if self._routing is not None:
                self.last_routing = _routing_since(self._routing, self.accelerator)
                logs |= _loads(self.last_routing)
            if getattr(self.data_collator, "skip_bad_rows", False):
                skipped = torch.tensor(float(self._skipped), device=self.accelerator.device)
                logs["rows_skipped"] = self.accelerator.reduce(skipped).item()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in TRL, with digests of the files; where that fails, says what is left to go on from."""
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            saved = Path(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}")
            if self.args.should_save and saved.is_dir():
                same_permissions(saved)
                write_digests(saved)
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = self.args.output_dir
            try:
                whole = last_complete_checkpoint(folder)
            except ValueError:
                whole = None
            remedy = f"resume from '{whole}'" if whole else "start again"
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written: {error} ('{folder}' has "
                f"{shutil.disk_usage(folder).free / 1e9:.2f} GB left). Make room, then {remedy}."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As in the library; of a spread adapter what is trained alone is brought together."""
        if self._is_spread and state_dict is None and hasattr(self.model, "peft_config"):
            state_dict = trained_weights(self.model)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._is_spread:
            save_states(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._is_spread:
            load_states(self, checkpoint)
            return
        if checkpoint is not None:
            check_states(checkpoint, spread=False)
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, **kwargs: Any) -> None:
        """As in TRL; weights get the permissions of the other files."""
        super().save_model(output_dir, **kwargs)
        if self.args.should_save:
            same_permissions(output_dir or self.args.output_dir)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, **kwargs: Any) -> None:
        """Ours: TRL's tells of a text model."""
        if not self.is_world_process_zero():
            return
        config, is_adapter = self.model.config, hasattr(self.model, "peft_config")
        name = self.hub_model_id or model_name or Path(self.args.output_dir).name
        base = getattr(config, "_name_or_path", "") or None
        card = trained_card(config, name, is_adapter, base_model=base, dataset=dataset_name)
        card.save(Path(self.args.output_dir) / "README.md")


def _name_of_decoder(model: nn.Module) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith("language_model"))


class _WriteFeatures(TrainerCallback):
    """Features that wait in memory are written with every checkpoint, and when an epoch ends."""

    def __init__(self, flush: Callable[[], None]):
        self.flush = flush

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.flush()

    on_save = on_evaluate = on_epoch_end


class ModalityLosses:
    """
    Sums the loss of each row by the modalities it has, while it is entered; of training and of evaluation apart.

    Args:
        model (`nn.Module`): With TRL's fused head; wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        config = model.config
        self.ids = {modality: getattr(config, f"{modality}_token_id") for modality in config.modalities}
        self._sums: dict[bool, torch.Tensor] = {}  # training -> (2 ** modalities, 2): loss and tokens
        self._handle: Any = None

    @property
    def is_entered(self) -> bool:
        """Whether it counts now."""
        return self._handle is not None

    def __enter__(self) -> "ModalityLosses":
        self._handle = self.model.register_forward_hook(self._after_model, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()
        self._handle = None

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if getattr(output, "log_probs", None) is None:
            return
        ids = kwargs["input_ids"]
        kinds = torch.zeros(len(ids), dtype=torch.long, device=ids.device)  # (B,)
        for number, token_id in enumerate(self.ids.values()):
            kinds += (ids == token_id).any(dim=1).long() << number
        losses = torch.stack([-output.log_probs.detach().sum(dim=1), output.label_mask.sum(dim=1)], dim=1).float()
        if module.training not in self._sums:
            self._sums[module.training] = torch.zeros(2 ** len(self.ids), 2, device=losses.device)
        self._sums[module.training].index_add_(0, kinds.to(losses.device), losses)

    def read(self, accelerator: Any, training: bool = True) -> dict[str, float]:
        """`loss/<modalities>` -> mean loss of a token over all processes; forgets what was counted."""
        sums = self._sums.pop(training, None)
        sums = torch.zeros(2 ** len(self.ids), 2, device=accelerator.device) if sums is None else sums
        logs = {}
        for kind, (loss, tokens) in enumerate(accelerator.reduce(sums).tolist()):
            if tokens:
                names = [name for number, name in enumerate(self.ids) if kind >> number & 1]
                logs[f"loss/{'+'.join(names) or 'text'}"] = loss / tokens
        return logs


def _routing_since(routing: RoutingRecorder, accelerator: Any) -> RoutingReport:
    """What was counted since the last time, over all processes."""
    report = routing.report()
    routing.reset()
    return replace(report, counts=accelerator.reduce(report.counts.to(accelerator.device)).cpu())


def _loads(report: RoutingReport) -> dict[str, float]:
    """Shares of the experts, and how much they tell of the modality."""
    counts = report.counts.sum(dim=1).double()  # (L, E)
    if not counts.any():
        return {}
    share = (counts / counts.sum(dim=1, keepdim=True)).mean(dim=0)
    logs = {f"load/{name}": value for name, value in zip(report.expert_names, share.tolist(), strict=True)}
    logs["load/max_over_min"] = (counts.amax(dim=1) / counts.amin(dim=1).clamp(min=1)).max().item()
    specialisation = report.specialisation
    logs |= {"specialisation/mean": specialisation.mean().item(), "specialisation/max": specialisation.max().item()}
    return logs


class ModalityGroupedSampler(Sampler[int]):
    r"""
    Orders rows so that each run of `size` has the same modalities and similar lengths; what is left over of every kind
    comes last, mixed. Every row comes once.

    Args:
        dataset (`Dataset`): Of rows with `messages` or `conversations`.
        size (`int`): Rows of an optimiser step, over all processes; with several lanes those of a batch.
        seed (`int`, *optional*, defaults to 0): Of the order; `set_epoch` changes it.
        lanes (`int`, *optional*, defaults to 1): Processes that take runs in turn. Each gets those of as few kinds as
            possible: one kind after the other fills the first lane, then the second.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.4; `Uni_MoE_speech_dp/train@f5e82dd`, which
    drops the last rows of every kind.
    """

    def __init__(self, dataset: Any, size: int, seed: int = 0, lanes: int = 1):
        self.size, self.seed, self.epoch, self.lanes = size, seed, 0, lanes
        self.kinds: dict[tuple[str, ...], list[int]] = {}
        self.lengths = []
        for index in range(len(dataset)):
            try:
                modalities, words = row_modalities(dataset[index])
            except ValueError:  # the collator will name the row, or skip it
                modalities, words = ("unreadable",), 0
            self.kinds.setdefault(modalities, []).append(index)
            self.lengths.append(words)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)

        def shuffled(items: list) -> list:
            return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]

        steps, rest = [], []
        for _, indices in sorted(self.kinds.items()) if self.lanes > 1 else self.kinds.items():
            # Neighbours in length, after a shuffle that decides among equals.
            order = sorted(shuffled(indices), key=lambda index: self.lengths[index])
            full = len(order) // self.size * self.size
            left = set(shuffled(order)[: len(order) - full])
            rest += [index for index in order if index in left]
            order = [index for index in order if index not in left]
            found = [order[start : start + self.size] for start in range(0, full, self.size)]
            steps += found if self.lanes == 1 else shuffled(found)
        if self.lanes == 1:
            steps = shuffled(steps)
        else:
            # What does not fill all lanes alike comes last, so that all take as many steps.
            even = len(steps) // self.lanes
            rest = [index for step in steps[even * self.lanes :] for index in step] + rest
            lanes = [steps[lane * even : (lane + 1) * even] for lane in range(self.lanes)]
            steps = [step for turn in zip(*lanes, strict=True) for step in turn]
        for step in steps:
            yield from shuffled(step)
        yield from shuffled(rest)


__all__ = [
    "ModalityGroupedSampler",
    "ModalityLosses",
    "UniMoESFTTrainer",
    "sft_config",
]
