"""
Experts come and go: add, drop, clone and merge the experts of a mixture.

Everything works in place, on every sparse layer at once, and changes nothing before every check has passed.
Letters: E experts, R rank, H hidden, I intermediate.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..hub.experts_uni_moe import UniMoESparseMoeBlock
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from .expert_adapters import CONNECTORS, choose_projectors, expert_names, lora_factors, read_expert
from .router_starts import mixture_config, sparse_blocks


Tensors = dict[str, torch.Tensor]  # what one expert holds of a block, by the names of the block's parameters
# Of a block with its own bases, with a shared one, and of LoRA.
_STACKS = ("experts.gate_up_proj", "experts.down_proj")
_LORA = ("experts.lora.gate_up_a", "experts.lora.gate_up_b", "experts.lora.down_a", "experts.lora.down_b")


def add_expert(
    model: UniMoEForConditionalGeneration,
    name: str,
    adapter: str | Path | None = None,
    like: str | None = None,
    projectors: Mapping[str, str] | None = None,
) -> UniMoEForConditionalGeneration:
    r"""
    Adds an expert as the last one. Its router row starts fresh: see [`start_routers`].

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts.
        name (`str`): Of the new expert.
        adapter (`str` or `Path`, *optional*): A stage-2 adapter; without one the expert starts as the plain network.
        like (`str`, *optional*): With own bases: the expert whose frozen base the adapter is added to, as the plain
            network itself is not stored; needed there.
        projectors (`dict[str, str]`, *optional*): Modality -> `name`, to take the adapter's trained projector in place
            of the model's; without it a projector that differs from the model's is an error.

    Returns:
        The same model.

    Raises:
        ValueError: the name is taken, the adapter does not fit, or it brings another projector.
    """
    config = mixture_config(model)
    names = expert_names(model.config.text_config)
    if not isinstance(name, str):
        raise ValueError(f"An expert's name is text, not {name!r}.")
    if name in names:
        raise ValueError(f"There is an expert '{name}' already; the model has {names}.")
    if config.shared_expert_base == (like is not None):
        raise ValueError(
            "With a shared base every expert starts from it; leave out `like`."
            if like is not None
            else f"With own bases a new expert starts from the frozen base of another: pass `like=` one of {names}."
        )
    if config.shared_expert_base and not config.expert_lora_rank:
        raise ValueError("Experts without LoRA on a shared base would all be the same; grow them with LoRA.")
    source = None if like is None else _index(model, like)
    given = (
        None if adapter is None else read_expert(name, adapter, config, [layer for layer, _ in sparse_blocks(model)])
    )
    chosen: Tensors = {}
    if given is not None and given.projectors:
        chosen = choose_projectors(model, [given], projectors or {})
        state, named = model.model.state_dict(), {CONNECTORS[modality] for modality in projectors or {}}
        unnamed = [key for key in chosen if key.split("_")[0] not in named]
        if differing := [key for key in unnamed if not torch.equal(state[key].cpu(), chosen[key])]:
            connector = differing[0].split("_")[0]
            raise ValueError(
                f"Expert '{name}' brings another projector for {connector} than the model's; to take it pass "
                f"`projectors={{'{'image' if connector == 'vision' else connector}': '{name}'}}`."
            )

    if given is not None and config.shared_expert_base and given.rank > config.expert_lora_rank:
        _raise_rank(model, given.rank)
    fresh = {id(block): _fresh(model, block, source) for block in _blocks(model)}
    if given is not None:
        for layer, block in sparse_blocks(model):
            tensors, scaling = fresh[id(block)], block.experts.lora_scaling
            parts = {
                (p, s): given.factors[layer, p, s].to(block.gate.weight.device, torch.float32)
                for p in ("gate", "up", "down")
                for s in "AB"
            }
            if config.shared_expert_base:
                _fill(tensors, parts, given.rank, given.scaling / scaling)
            else:
                gate_up = torch.cat([parts[p, "B"] @ parts[p, "A"] for p in ("gate", "up")])
                down = parts["down", "B"] @ parts["down", "A"]
                for key, delta in zip(_STACKS, (gate_up, down), strict=True):
                    tensors[key] = (tensors[key].float() + given.scaling * delta).to(tensors[key].dtype)
    _restack(model, [*range(len(names)), fresh], [*names, name])
    model.model.load_state_dict(chosen, strict=False)
    return model


def drop_expert(model: UniMoEForConditionalGeneration, name: str) -> UniMoEForConditionalGeneration:
    """
    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts.
        name (`str`): Of the expert to remove, with its router row.

    Returns:
        The same model.

    Raises:
        ValueError: there is no such expert, or too few would be left for `num_experts_per_tok`.
    """
    config, names, index = mixture_config(model), expert_names(model.config.text_config), _index(model, name)
    if len(names) - 1 < config.num_experts_per_tok:
        raise ValueError(
            f"Without '{name}' {len(names) - 1} experts are left, but every token goes to "
            f"`num_experts_per_tok={config.num_experts_per_tok}`; lower that first."
        )
    kept = [number for number in range(len(names)) if number != index]
    _restack(model, kept, [names[number] for number in kept])
    return model


def clone_expert(model: UniMoEForConditionalGeneration, name: str, new_name: str) -> UniMoEForConditionalGeneration:
    """
    Adds a copy of an expert as the last one. Both have the same router row, so tokens that prefer the one are sent to
    both until training tells them apart.

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts.
        name, new_name (`str`): Of the expert, and of its copy.

    Returns:
        The same model.

    Raises:
        ValueError: there is no such expert, or the new name is taken.
    """
    names, index = expert_names(model.config.text_config), _index(model, name)
    if new_name in names:
        raise ValueError(f"There is an expert '{new_name}' already; the model has {names}.")
    _restack(model, [*range(len(names)), index], [*names, new_name])
    return model


@torch.no_grad()
def merge_experts(
    model: UniMoEForConditionalGeneration, weights: Mapping[str, float], new_name: str, rank: int | None = None
) -> dict[str, float]:
    r"""
    Replaces experts by one: the weighted sum of what they add to the base, cut to the best approximation of a rank.

    The new expert stands where the first of them stood; its router row is the weighted mean of theirs. With own bases
    the bases are summed with the same weights, which must then add up to 1.

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture of experts.
        weights (`dict[str, float]`): Expert -> weight; at least two.
        new_name (`str`): Of the new expert.
        rank (`int`, *optional*): Of its LoRA, at most the model's, which is the default; smaller ones are filled up.

    Returns:
        `dict[str, float]`: of each layer's products ("layers.0 gate", ...), the Frobenius norm of what was cut off, as
        a share of the sum's; 0 where the rank suffices. Empty for experts without LoRA.

    Raises:
        ValueError: an expert is unknown, the name is taken, weights do not add up to 1 (own bases) or to 0, or too few
            experts would be left.
    """
    config, names = mixture_config(model), expert_names(model.config.text_config)
    indices = [_index(model, name) for name in weights]
    kept = [name for name in names if name not in weights]
    total = sum(weights.values())
    if len(indices) < 2:
        raise ValueError(f"Merging takes at least two experts, got {list(weights)}; the model has {names}.")
    if new_name in kept:
        raise ValueError(f"There is an expert '{new_name}' already; the model has {names}.")
    if len(kept) + 1 < config.num_experts_per_tok:
        raise ValueError(
            f"{len(kept) + 1} experts would be left for `num_experts_per_tok={config.num_experts_per_tok}`."
        )
    if not abs(total) > 1e-6 or not math.isfinite(total) or (not config.shared_expert_base and abs(total - 1) > 1e-6):
        raise ValueError(f"Weights {dict(weights)} add up to {total:g}; with own bases they must to 1, else not to 0.")
    rank = config.expert_lora_rank if rank is None else rank
    if config.expert_lora_rank and not 1 <= rank <= config.expert_lora_rank:
        raise ValueError(
            f"`rank={rank}` must lie between 1 and the model's `expert_lora_rank={config.expert_lora_rank}`."
        )

    share = list(weights.values())
    merged, errors = {}, {}
    for layer, block in sparse_blocks(model):
        state = dict(block.named_parameters())
        tensors = {key: _weighted(state[key], indices, share) for key in _STACKS if key in state}
        tensors["gate.weight"] = _weighted(state["gate.weight"], indices, [weight / total for weight in share])
        if block.experts.lora is not None:
            slots = {key: torch.zeros_like(state[key][0]) for key in _LORA}
            for projection, a, b in lora_factors(block.experts.lora):
                low, high, error = _truncated_sum(a[indices], b[indices], share, rank)
                for side, value in (("A", low), ("B", high)):
                    _slot(slots, projection, side, rank).copy_(value)
                errors[f"layers.{layer} {projection}"] = error
            tensors |= slots
        merged[id(block)] = tensors
    place = min(indices)
    rest = [number for number in range(len(names)) if number not in indices]
    before = [number for number in rest if number < place]
    after = [number for number in rest if number > place]
    _restack(model, [*before, merged, *after], [*(names[i] for i in before), new_name, *(names[i] for i in after)])
    return errors


def _index(model: UniMoEForConditionalGeneration, name: str) -> int:
    names = expert_names(model.config.text_config)
    if name not in names:
        raise ValueError(f"There is no expert '{name}'; the model has {names}.")
    return names.index(name)


def _blocks(model: UniMoEForConditionalGeneration) -> list[UniMoESparseMoeBlock]:
    return [block for _, block in sparse_blocks(model)]


def _parameters(block: UniMoESparseMoeBlock) -> dict[str, nn.Parameter]:
    """Those that hold a row for each expert."""
    return {name: tensor for name, tensor in block.named_parameters() if ".base." not in name}


@torch.no_grad()
def _restack(model: UniMoEForConditionalGeneration, experts: list[int | dict[int, Tensors]], names: list[str]) -> None:
    """New stacks from old rows, by number, and from given ones (block -> tensors)."""
    config = model.config.text_config
    for block in _blocks(model):
        for name, old in _parameters(block).items():
            rows = [old[each] if isinstance(each, int) else each[id(block)][name] for each in experts]
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(torch.stack(rows), old.requires_grad))
        block.experts.num_experts = len(experts)
        # What a merge laid aside had other experts.
        block.experts.__dict__.pop("_unmerged", None)
        block.experts._is_merged = False
    model._unmerged_config = None
    config.num_experts, config.expert_names = len(names), names


@torch.no_grad()
def _fresh(model: UniMoEForConditionalGeneration, block: UniMoESparseMoeBlock, source: int | None) -> Tensors:
    """A new expert: an untrained router row and LoRA, and the frozen base of `source` where bases are own."""
    initialise = model.model.language_model._init_weights
    old = dict(_parameters(block))
    made = {name: torch.empty_like(tensor[0]) for name, tensor in old.items()}
    template = type(block.gate)(model.config.text_config)
    template.weight = nn.Parameter(torch.empty_like(block.gate.weight[:1]))
    initialise(template)
    made["gate.weight"] = template.weight[0].detach()
    if block.experts.lora is not None:
        for name in _LORA:
            if name.endswith("_b"):
                made[name].zero_()
            else:
                bound = made[name].shape[-1] ** -0.5
                made[name].uniform_(-bound, bound)
    for name in _STACKS:
        if name in made:
            made[name].copy_(old[name][source])
    return made


@torch.no_grad()
def _raise_rank(model: UniMoEForConditionalGeneration, rank: int) -> None:
    """Fills all experts' LoRA up to a larger rank, without changing what they compute."""
    config = model.config.text_config
    old_rank, scaling = config.expert_lora_rank, config.expert_lora_alpha / config.expert_lora_rank
    for block in _blocks(model):
        lora = block.experts.lora
        for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"):
            old = getattr(lora, name)
            halves = old.chunk(2, dim=1) if name == "gate_up_a" else (old,)
            axis = 1 if name.endswith("_a") else 2
            wider = []
            for half in halves:
                shape = list(half.shape)
                shape[axis] = rank - old_rank
                filling = half.new_zeros(shape)
                if axis == 1:  # A may be trained from here on only if it is not zero
                    filling.uniform_(-(half.shape[-1] ** -0.5), half.shape[-1] ** -0.5)
                wider.append(torch.cat([half, filling], dim=axis))
            setattr(lora, name, nn.Parameter(torch.cat(wider, dim=1), old.requires_grad))
        block.experts.lora_rank = rank
    config.expert_lora_rank, config.expert_lora_alpha = rank, scaling * rank


def _slot(tensors: Tensors, projection: str, side: str, rank: int) -> torch.Tensor:
    """The first `rank` rows of an expert's A, or columns of its B, for one projection."""
    stack = tensors[f"experts.lora.{'down' if projection == 'down' else 'gate_up'}_{side.lower()}"]
    if projection != "down":
        stack = stack.chunk(2)[0 if projection == "gate" else 1]
    return stack[:rank] if side == "A" else stack[:, :rank]


def _fill(tensors: Tensors, factors: Mapping[tuple[str, str], torch.Tensor], rank: int, ratio: float) -> None:
    """An adapter's factors into a new expert's slots; slots above its rank keep a zero B."""
    for (projection, side), value in factors.items():
        _slot(tensors, projection, side, rank).copy_(value if side == "A" else value * ratio)


def _weighted(stack: torch.Tensor, indices: list[int], weights: list[float]) -> torch.Tensor:
    total = sum(weight * stack[index].float() for index, weight in zip(indices, weights, strict=True))
    return total.to(stack.dtype)


def _truncated_sum(
    a: torch.Tensor, b: torch.Tensor, weights: list[float], rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Factors of the best rank-`rank` approximation of `sum(w B A)`, never forming it, and the relative error."""
    tall = torch.cat([weight * each.double() for weight, each in zip(weights, b, strict=True)], dim=1)  # (out, kR)
    wide = torch.cat([each.double() for each in a])  # (kR, in)
    left, triangle = torch.linalg.qr(tall)
    right, other = torch.linalg.qr(wide.T)
    u, values, v = torch.linalg.svd(triangle @ other.T)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    high, low = left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
    norm = values.norm().item()
    error = values[rank:].norm().item() / norm if norm else 0.0
    return low.to(a.dtype), high.to(b.dtype), error


__all__ = ["add_expert", "clone_expert", "drop_expert", "merge_experts"]
