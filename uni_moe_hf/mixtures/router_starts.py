"""
Where routers start: at random, with even loads, or informed of what each expert is good for.

Letters: E experts, H hidden, N tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..hub.configuration_uni_moe import MODALITIES, is_sparse
from ..hub.experts_uni_moe import UniMoESparseMoeBlock, load_balancing_loss
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from .evaluating import evaluating
from .expert_adapters import check_is_ours


ROUTER_STARTS = ("informed", "balanced", "random")
# Batches of one optimiser step of informed routers: of as many kinds of rows, so that kinds do not pull in turn.
BATCHES_PER_STEP = 4
# Of the balancing loss meanwhile: enough that no expert is left without tokens.
BALANCE = 0.1


def start_routers(
    model: UniMoEForConditionalGeneration, batches: Iterable[Mapping[str, Any]], router_start: str = "informed"
) -> None:
    r"""
    Sets fresh routers where stage 3 is to begin. Works in place.

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts whose routers have not been trained.
        batches (`Iterable[dict]`): As in [`inform_routers`]; not used for a random start.
        router_start (`str`, *optional*, defaults to `"informed"`): `"balanced"` evens loads ([`balance_routers`]),
            `"informed"` then learns which expert lowers whose loss ([`inform_routers`]), `"random"` changes nothing.

    Raises:
        ValueError: there is no such start, no batch, or the model is no mixture.
    """
    if router_start not in ROUTER_STARTS:
        raise ValueError(f"`router_start` is {router_start!r}; it must be one of {', '.join(ROUTER_STARTS)}.")
    mixture_config(model)
    if router_start == "random":
        return
    batches = list(batches)
    with _routers_kept_on_failure(model):
        balance_routers(model, batches)
        if router_start == "informed":
            inform_routers(model, batches)


def inform_routers(
    model: UniMoEForConditionalGeneration, batches: Sequence[Mapping[str, Any]], steps: int = 32
) -> dict[str, tuple[float, float]]:
    r"""
    Trains routers alone, for a few steps: experts, attention and connectors stay as they are. What is learned is
    which expert helps with which rows, before stage 3 bends the experts to whatever they happen to get.

    The logarithm of each batch's loss is minimised, so that a medium whose answers are nearly certain counts as much
    as one whose answers are hard, and a balancing loss keeps every expert in use. The step size follows from the
    routers' inputs: the first step moves a logit by 1 at most.

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts; begin with [`balance_routers`].
        batches (`Sequence[dict]`): Model inputs with `labels`. The rows of a batch should have the same modalities:
            these kinds are what counts alike. Some 64 rows of each are enough.
        steps (`int`, *optional*, defaults to 32): Of the optimiser, each on batches of up to four kinds.

    Returns:
        `dict[str, tuple[float, float]]`: modalities, such as "image+speech" -> mean loss of the answers in the first
        and in the last quarter of the steps.

    Raises:
        ValueError: the model is no mixture, there are no batches, or they have no labels. Nothing has changed then.
    """
    config = mixture_config(model)
    if steps < 1:
        raise ValueError(f"`steps` is {steps}; routers are informed in 1 or more.")
    kinds = _by_kind(model, batches)
    blocks = [block for _, block in sparse_blocks(model)]
    dtypes = [block.gate.weight.dtype for block in blocks]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen, coefficient = config.num_experts_per_tok, config.router_aux_loss_coef
    model.requires_grad_(False)
    # A single expert's weight is 1 whatever its logit: only a second one lets the loss speak to the router.
    config.num_experts_per_tok = min(max(2, chosen), config.num_experts)
    config.router_aux_loss_coef = 0.0
    try:
        with evaluating(model), _routers_kept_on_failure(model):
            for block in blocks:
                block.gate.weight.data = block.gate.weight.data.float()
                block.gate.weight.requires_grad_(True)
            losses = _learn(model, blocks, kinds, steps)
    finally:
        config.num_experts_per_tok, config.router_aux_loss_coef = chosen, coefficient
        for block, dtype in zip(blocks, dtypes, strict=True):
            block.gate.weight.data = block.gate.weight.data.to(dtype)
            block.gate.weight.grad = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    return {kind: _ends(found) for kind, found in losses.items()}


def _learn(
    model: UniMoEForConditionalGeneration,
    blocks: list[UniMoESparseMoeBlock],
    kinds: dict[str, list[Mapping[str, Any]]],
    steps: int,
) -> dict[str, list[float]]:
    """Trains the routers of `blocks`; returns the losses of each kind in their order."""
    rates = _step_sizes(model, blocks, next(iter(kinds.values()))[0])
    optimizer = torch.optim.Adam(
        [{"params": [block.gate.weight], "lr": rate} for block, rate in zip(blocks, rates, strict=True)]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    names = list(kinds)
    losses: dict[str, list[float]] = {}
    order: list[int] = []
    per_step = min(BATCHES_PER_STEP, len(names))
    top_k = model.config.text_config.num_experts_per_tok
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(per_step):
            order = order or torch.randperm(len(names), generator=generator).tolist()
            kind = names[order.pop()]
            batch = kinds[kind][torch.randint(len(kinds[kind]), (1,), generator=generator).item()]
            outputs = model(**batch, output_router_logits=True, use_cache=False)
            answers = outputs.loss  # without the balancing loss, whose coefficient is 0 meanwhile
            if not answers.isfinite():
                raise ValueError(
                    f"The loss of rows of {kind} is {answers.item()}; `uni-moe doctor` looks for the cause."
                )
            balance = load_balancing_loss(outputs.router_logits, top_k, batch.get("attention_mask"))
            loss = answers.clamp(min=1e-6).log() + BALANCE * balance.to(answers.device)
            (loss / per_step).backward()
            losses.setdefault(kind, []).append(answers.item())
        optimizer.step()
        schedule.step()
    if not all(block.gate.weight.isfinite().all() for block in blocks):
        raise ValueError("Routers became no numbers while they were informed; `uni-moe doctor` looks for the cause.")
    return losses


@contextmanager
def _routers_kept_on_failure(model: UniMoEForConditionalGeneration) -> Iterator[None]:
    """Whatever goes wrong, an interruption too, leaves routers as they were."""
    before = [(block.gate.weight, block.gate.weight.detach().clone()) for _, block in sparse_blocks(model)]
    try:
        yield
    except BaseException:
        for parameter, weight in before:
            parameter.data = weight
        raise


def _ends(losses: list[float]) -> tuple[float, float]:
    """Means of the first and of the last quarter."""
    quarter = max(1, len(losses) // 4)
    return sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter


def _by_kind(
    model: UniMoEForConditionalGeneration, batches: Sequence[Mapping[str, Any]]
) -> dict[str, list[Mapping[str, Any]]]:
    """Batches by the modalities whose placeholders they hold."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for batch in batches:
        if batch.get("labels") is None or not (batch["labels"] != -100).any():
            raise ValueError("Informed routers learn from answers, and a batch has no `labels`; balance them instead.")
        placeholders = {m: getattr(model.config, f"{m}_token_id", None) for m in MODALITIES}
        held = [m for m, token in placeholders.items() if token is not None and (batch["input_ids"] == token).any()]
        kinds.setdefault("+".join(held) or "text", []).append(batch)
    if not kinds:
        raise ValueError("Informed routers learn from batches, and there are none.")
    return kinds


@torch.no_grad()
def _step_sizes(
    model: UniMoEForConditionalGeneration, blocks: list[UniMoESparseMoeBlock], batch: Mapping[str, Any]
) -> list[float]:
    """
    For each router one over the mean absolute sum of its inputs: Adam's first step, which moves every weight by its
    rate, then moves a logit by 1 at most.
    """
    sizes: dict[nn.Module, float] = {}
    hooks = [
        block.gate.register_forward_pre_hook(
            lambda gate, args: sizes.update({gate: args[0].float().abs().sum(dim=-1).mean().item()})
        )
        for block in blocks
    ]
    try:
        model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [1 / max(sizes[block.gate], 1e-6) for block in blocks]


@torch.no_grad()
def balance_routers(
    model: UniMoEForConditionalGeneration, batches: Iterable[Mapping[str, Any]], rounds: int = 200
) -> dict[int, float]:
    r"""
    Shifts fresh routers so that the experts get equal shares of the tokens in `batches`: where training should start.

    A router has no bias, and a random one sends most tokens to the same experts, because hidden states share a large
    common part. So each row is moved along the one direction whose product with every token is nearly 1, by an amount
    that is adjusted until the shares agree. Layers are done from the first to the last, as each changes the next.

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts whose routers have not been trained.
        batches (`Iterable[dict]`): Model inputs, as the collator makes them; a few thousand tokens are enough.
        rounds (`int`, *optional*, defaults to 200): Adjustments of each layer.

    Returns:
        `dict[int, float]`: layer -> largest over smallest share after it.
    """
    mixture_config(model)
    batches = [{k: v for k, v in batch.items() if k not in ("labels", "logits_to_keep")} for batch in batches]
    if not batches:
        raise ValueError("Routers are balanced on batches, and there are none.")
    ratios, blocks = {}, dict(sparse_blocks(model))
    with evaluating(model), _routers_kept_on_failure(model):
        # From layer to layer with all batches, so that towers and layers run once for all routers.
        layers = model.model.language_model.layers
        calls = [_stopped_at(layers[0], model, **batch, use_cache=False) for batch in batches]
        for number, layer in enumerate(layers):
            if number in blocks:
                rows = []
                for batch, (args, kwargs) in zip(batches, calls, strict=True):
                    (hidden,), _ = _stopped_at(blocks[number], layer, *args, **kwargs)  # (B, T, H)
                    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                    rows.append(hidden[mask.to(hidden.device)].float())
                ratios[number] = _balance(blocks[number], torch.cat(rows), rounds)
            calls = [((layer(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in calls]
    return ratios


class _Reached(Exception):
    """Ends a forward pass where its rest does not matter."""


def _stopped_at(module: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
    """What `module` is called with when `model` is."""
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(*args, **kwargs)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


def _balance(block: UniMoESparseMoeBlock, hidden: torch.Tensor, rounds: int) -> float:
    """Shifts a router for the tokens `(N, H)` that it sees; returns largest over smallest share."""
    weight, top_k = block.gate.weight.float(), block.gate.config.num_experts_per_tok
    gram = hidden.T @ hidden
    if not gram.isfinite().all():
        raise ValueError("The tokens at a router are no numbers; `uni-moe doctor` looks for the cause.")
    ridge = (1e-3 * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), device=gram.device)
    direction = torch.linalg.solve(gram + ridge, hidden.sum(dim=0))  # (H,)
    logits, along = hidden @ weight.T, hidden @ direction  # (N, E), (N,)

    def shares(logits: torch.Tensor) -> torch.Tensor:
        chosen = logits.topk(top_k, dim=-1).indices
        return torch.bincount(chosen.flatten(), minlength=len(weight)) / len(hidden)

    def ratio(share: torch.Tensor) -> float:
        return (share.max() / share.min().clamp(min=1e-9)).item()

    shift, step = torch.zeros(len(weight), device=hidden.device), logits.std()
    best, best_ratio = shift, float("inf")
    for number in range(rounds):
        share = shares(logits + along[:, None] * shift)
        if ratio(share) < best_ratio:
            best, best_ratio = shift, ratio(share)
        shift = shift + step * (1 - number / rounds) * (top_k / len(weight) - share)
    block.gate.weight.add_((best[:, None] * direction).to(block.gate.weight.dtype))
    return ratio(shares(hidden @ block.gate.weight.float().T))  # of what is stored, rounding included


def mixture_config(model: Any) -> PreTrainedConfig:
    """Of a model whose experts can be changed."""
    check_is_ours(model)
    config = model.config.text_config
    if not is_sparse(config):
        raise ValueError("The model is dense; make experts with `grow_experts`.")
    if getattr(model, "is_quantized", False):
        raise ValueError("Experts of a quantised model cannot be changed; load it without `quantization_config`.")
    return config


def sparse_blocks(model: UniMoEForConditionalGeneration) -> list[tuple[int, UniMoESparseMoeBlock]]:
    """Sparse layers: number and block."""
    layers = enumerate(model.model.language_model.layers)
    return [(index, layer.mlp) for index, layer in layers if isinstance(layer.mlp, UniMoESparseMoeBlock)]


__all__ = [
    "ROUTER_STARTS",
    "balance_routers",
    "inform_routers",
    "mixture_config",
    "sparse_blocks",
    "start_routers",
]
