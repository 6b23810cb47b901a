"""
The sparse mixture of modality experts: router, experts with LoRA, and the block that joins them.

Letters: N tokens, K experts per token, E experts, H hidden, I intermediate, R LoRA rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from .expert_kernels_uni_moe import ROUTES, is_quantised, own_index
from .expert_segments_uni_moe import ACTIVATIONS


# Linear layers of a gated feed-forward network.
FUSED, SPLIT = ("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")


class FeedForward(NamedTuple):
    """
    What a mixture must know of the gated feed-forward network that it replaces:
    `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, gate and up one after the other or fused.

    Args:
        hidden_size, intermediate_size (`int`): H and I.
        act_fn (`nn.Module` or `Callable`): The activation.
        is_fused (`bool`): Whether one `gate_up_proj` gives both halves, gate first.
    """

    hidden_size: int
    intermediate_size: int
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    is_fused: bool

    @property
    def projections(self) -> tuple[str, ...]:
        """`tuple[str]`: names of the linear layers."""
        return FUSED if self.is_fused else SPLIT


def read_feed_forward(mlp: nn.Module | None) -> FeedForward:
    """
    Args:
        mlp (`nn.Module`): A decoder layer's `mlp`.

    Returns:
        [`FeedForward`], read from its linear layers.

    Raises:
        ValueError: it is none that experts can stand in for; the message says what is missing.
    """
    if mlp is None:
        raise ValueError("its layers have no feed-forward network called `mlp`")
    if hasattr(mlp, "experts"):
        raise ValueError("its layers are mixtures of experts already")
    is_fused = hasattr(mlp, "gate_up_proj")
    names = FUSED if is_fused else SPLIT
    if missing := [name for name in names if not isinstance(getattr(mlp, name, None), nn.Linear)]:
        raise ValueError(f"its feed-forward networks have no gate (`{missing[0]}`)")
    if others := sorted({name for name, _ in mlp.named_parameters()} - {f"{name}.weight" for name in names}):
        what = "biases" if others[0].endswith("bias") else "weights besides the three projections'"
        raise ValueError(f"its feed-forward networks have {what} (`mlp.{others[0]}`), which experts have no place for")
    act_fn = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if act_fn is None:
        raise ValueError("the activation of its feed-forward networks is neither `act_fn` nor `activation_fn`")
    return FeedForward(mlp.down_proj.out_features, mlp.down_proj.in_features, act_fn, is_fused)


def gated_weights(mlp: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of gate and up `(I, H)` and down `(H, I)` of a feed-forward network, as views."""
    if hasattr(mlp, "gate_up_proj"):
        return *mlp.gate_up_proj.weight.chunk(2), mlp.down_proj.weight
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


def activation_name(act_fn: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """The one of `ACTIVATIONS` that a function computes, whatever it is called; `None` for others."""
    points = torch.linspace(-20, 20, 161, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        values = act_fn(points)
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(values, activation.run(points), atol=1e-6):
            return name
    return None


class UniMoETopKRouter(nn.Module):
    """
    Scores every token against every expert and keeps the best `num_experts_per_tok`.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), equations 16 and 17; the weights are renormalised over
    the kept experts as in `Uni_MoE_speech/model/moe/moe.py@f5e82dd` (the paper's formula shows no renormalisation).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config  # read at every call: the number of experts per token may be changed
        self.dtype = getattr(torch, config.router_dtype)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`):
                One row per token; the caller has already merged batch and sequence.

        Returns:
            `tuple(torch.Tensor)`: *router_logits* `(num_tokens, num_experts)`, before any softmax: index 0 is what the
            output recorder keeps; *top_k_weights* `(num_tokens, num_experts_per_tok)`, rows sum to 1; *top_k_index*,
            same shape, `int64` in `[0, num_experts)`.
        """
        # Autocast would lower the product to its own precision whatever the operands' dtype is.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.to(self.dtype), self.weight.to(self.dtype))  # (N, E)
        top_logits, top_k_index = torch.topk(logits, self.config.num_experts_per_tok, dim=-1)  # (N, K)
        top_k_weights = torch.softmax(top_logits, dim=-1, dtype=torch.float32)  # (N, K)
        return logits, top_k_weights, top_k_index


class ExpertLoraTensors(NamedTuple):
    """LoRA factors of all experts, gate before up: `(E, 2R, H)`, `(E, 2I, R)`, `(E, R, I)`, `(E, H, R)`."""

    gate_up_a: torch.Tensor
    gate_up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor


def merged_weights(
    gate_up: torch.Tensor, down: torch.Tensor, lora: ExpertLoraTensors, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        gate_up (`torch.Tensor` of shape `(E, 2I, H)`, or `(2I, H)` of a shared base): Frozen weights, gate rows first.
        down (`torch.Tensor` of shape `(E, H, I)` or `(H, I)`): Likewise.
        lora ([`ExpertLoraTensors`]): Of all experts.
        scaling (`float`): What LoRA's products are multiplied by.

    Returns:
        `tuple(torch.Tensor)`: each expert's weights with its LoRA, `(E, 2I, H)` and `(E, H, I)`, in the dtypes of the
        frozen ones; the sums are made in float32 and rounded once.
    """
    gate_up_a, gate_up_b, down_a, down_b = (factor.float() for factor in lora)
    pairs = zip(gate_up_b.chunk(2, dim=1), gate_up_a.chunk(2, dim=1), strict=True)
    gate_up_difference = scaling * torch.cat([b @ a for b, a in pairs], dim=1)
    down_difference = scaling * (down_b @ down_a)
    return (
        (gate_up.float() + gate_up_difference).to(gate_up.dtype),
        (down.float() + down_difference).to(down.dtype),
    )


class UniMoEExpertLora(nn.Module):
    """
    Holds the LoRA factors of all experts of a layer, apart from the frozen weights.

    A module of its own, so that PEFT's `modules_to_save` can train and save it alone. It has to be *called*: PEFT and
    offloading act on calls, an attribute read goes past them.
    """

    def __init__(self, config: PreTrainedConfig, hidden: int, inner: int):
        super().__init__()
        experts, rank = config.num_experts, config.expert_lora_rank
        # Names without "lora_": PEFT takes every key with that substring for one of its own.
        self.gate_up_a = nn.Parameter(torch.empty(experts, 2 * rank, hidden))
        self.gate_up_b = nn.Parameter(torch.empty(experts, 2 * inner, rank))
        self.down_a = nn.Parameter(torch.empty(experts, rank, inner))
        self.down_b = nn.Parameter(torch.empty(experts, hidden, rank))

    def forward(self, hidden_states: torch.Tensor | None = None) -> ExpertLoraTensors:
        """
        Args:
            hidden_states (`torch.Tensor`, *optional*): Gives the dtype; PEFT keeps trained copies in float32.

        Returns:
            [`ExpertLoraTensors`] in the dtype of `hidden_states`, or as they are stored.
        """
        tensors = (self.gate_up_a, self.gate_up_b, self.down_a, self.down_b)
        if hidden_states is None:
            return ExpertLoraTensors(*tensors)
        return ExpertLoraTensors(*(tensor.to(hidden_states.dtype) for tensor in tensors))


class UniMoELoraExperts(nn.Module):
    """
    The gated experts of one layer, in place of its `mlp`, whose sizes and activation they have. Their frozen weights
    are stored in one of two ways, and each expert adds its LoRA:

    * own base (`shared_expert_base=False`): `gate_up_proj` `(E, 2I, H)`, gate rows first, and `down_proj` `(E, H, I)`;
    * shared base (`shared_expert_base=True`): `base` is the `mlp` itself; an expert is that plus its own LoRA.

    `forward` takes the route that `experts_implementation` names: "eager" is below, the others are in
    `expert_kernels_uni_moe.py`, and "auto", the default, chooses among them.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.2; `LlamaMLPLoRA` of
    `Uni_MoE_8e/Uni_MoE_speech/model@f5e82dd` for LoRA inside the experts.
    """

    def __init__(self, config: PreTrainedConfig, mlp: nn.Module):
        super().__init__()
        replaced = read_feed_forward(mlp)
        self.config = config
        # Where the library keeps what `from_pretrained(experts_implementation=...)` asks for.
        self.experts_implementation = getattr(config, "_experts_implementation", None) or "auto"
        self.num_experts = config.num_experts
        self.hidden_size, self.intermediate_size = hidden, inner = replaced.hidden_size, replaced.intermediate_size
        self.act_fn, self.activation = replaced.act_fn, activation_name(replaced.act_fn)
        self.shared_base, self.has_fused_base = config.shared_expert_base, replaced.is_fused
        if self.shared_base:
            self.base = mlp
        else:
            self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
            self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))

        self.lora_rank = config.expert_lora_rank
        self.lora_scaling = config.expert_lora_alpha / self.lora_rank if self.lora_rank else 0.0
        self.lora = UniMoEExpertLora(config, hidden, inner) if self.lora_rank else None
        self.lora_dropout = nn.Dropout(config.expert_lora_dropout)
        self._is_merged = False

    def lora_tensors(self, hidden_states: torch.Tensor | None) -> ExpertLoraTensors | None:
        """The LoRA factors in the dtype of `hidden_states`, or as they are stored; `None` for plain experts."""
        return None if self.lora is None else self.lora(hidden_states)

    def base_gate_up(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(n, H)` rows through a shared base's first layers, which are *called*: gate and up `(n, I)`."""
        if self.has_fused_base:
            gate, up = self.base.gate_up_proj(hidden_states).chunk(2, dim=-1)
            return gate, up
        return self.base.gate_proj(hidden_states), self.base.up_proj(hidden_states)

    def base_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A shared base's weights, see [`gated_weights`]."""
        return gated_weights(self.base)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): One row per token.
            top_k_index (`torch.Tensor` of shape `(num_tokens, num_experts_per_tok)`): Experts of each token, `int64`
                in `[0, num_experts)`.
            top_k_weights (`torch.Tensor` of shape `(num_tokens, num_experts_per_tok)`): Their weights.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`.
        """
        route = ROUTES[self.experts_implementation]
        return route(self, hidden_states, top_k_index, top_k_weights)

    def eager_forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The readable reference: one expert after the other. Arguments and result as in [`forward`]."""
        top_k_index = own_index(self, top_k_index)
        lora = self.lora_tensors(hidden_states)
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == expert)
            rows = self._expert(expert, hidden_states[token], lora)
            output.index_add_(0, token, (rows * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    def _expert(self, expert: int, rows: torch.Tensor, lora: ExpertLoraTensors | None) -> torch.Tensor:
        """`(n, H)` rows through one expert."""
        if self.shared_base:
            gate, up = self.base_gate_up(rows)  # (n, I)
        else:
            gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)  # (n, I)
        if lora is not None:
            low_gate, low_up = F.linear(self.lora_dropout(rows), lora.gate_up_a[expert]).chunk(2, dim=-1)  # (n, R)
            b_gate, b_up = lora.gate_up_b[expert].chunk(2, dim=0)  # (I, R)
            gate = gate + self.lora_scaling * F.linear(low_gate, b_gate)
            up = up + self.lora_scaling * F.linear(low_up, b_up)
        inner = self.act_fn(gate) * up  # (n, I)
        output = self.base.down_proj(inner) if self.shared_base else F.linear(inner, self.down_proj[expert])
        if lora is not None:
            low = F.linear(self.lora_dropout(inner), lora.down_a[expert])  # (n, R)
            output = output + self.lora_scaling * F.linear(low, lora.down_b[expert])
        return output  # (n, H)

    @torch.no_grad()
    def merge_lora(self) -> None:
        """
        Folds each expert's LoRA into its frozen weights; afterwards these are plain experts with their own bases.

        The sums are made in float32 and rounded once. With a shared base this allocates `num_experts` copies of it.
        Use [`UniMoEPreTrainedModel.merge_expert_lora`], which keeps the config in step.

        Raises:
            ValueError: there is no LoRA to merge, or the frozen weights are quantised.
        """
        if self.lora is None:
            raise ValueError("These experts hold no LoRA (rank 0 or already merged), so there is nothing to merge.")
        frozen = self.base.down_proj.weight if self.shared_base else self.down_proj
        if is_quantised(frozen):
            raise ValueError("Quantised experts cannot be merged; load the model without `quantization_config`.")
        if self.shared_base:
            gate, up, down = self.base_weights()
            gate_up = torch.cat([gate, up])
        else:
            gate_up, down = self.gate_up_proj, self.down_proj
        merged = merged_weights(gate_up, down, self.lora(None), self.lora_scaling)
        self.gate_up_proj, self.down_proj = (nn.Parameter(weights, frozen.requires_grad) for weights in merged)
        # Kept for `unmerge_lora`, outside the module tree so that saving does not see them.
        base = self.base if self.shared_base else None
        self.__dict__["_unmerged"] = {"lora": self.lora, "base": base, "dtype": gate_up.dtype}
        if self.shared_base:
            del self.base
        self.lora, self.shared_base, self._is_merged = None, False, True

    @torch.no_grad()
    def unmerge_lora(self) -> None:
        """
        Undoes [`merge_lora`]: bit-exact with a shared base, within the dtype's rounding with own bases.

        Raises:
            ValueError: nothing was merged in this process.
        """
        if not self._is_merged:
            raise ValueError("These experts were not merged in this process, so they cannot be unmerged.")
        gate_up, down = self.gate_up_proj, self.down_proj
        unmerged = self.__dict__.pop("_unmerged")
        # What lay aside did not follow `.to(...)` calls in between. Trained LoRA has a dtype of its own.
        self.lora = unmerged["lora"].to(gate_up.device, None if gate_up.dtype == unmerged["dtype"] else gate_up.dtype)
        self._is_merged = False
        if unmerged["base"] is not None:
            self.base, self.shared_base = unmerged["base"].to(gate_up.device, gate_up.dtype), True
            del self.gate_up_proj, self.down_proj
            return
        plain = merged_weights(gate_up, down, self.lora(None), -self.lora_scaling)
        self.gate_up_proj, self.down_proj = (nn.Parameter(weights, gate_up.requires_grad) for weights in plain)


class UniMoESparseMoeBlock(nn.Module):
    """
    Router and experts in place of a decoder layer's feed-forward network.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), equation 17.
    """

    def __init__(self, config: PreTrainedConfig, mlp: nn.Module):
        super().__init__()
        self.gate = UniMoETopKRouter(config)
        self.experts = UniMoELoraExperts(config, mlp)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): After the layer's
                second norm.

        Returns:
            `torch.Tensor` of the same shape.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (N, H)
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights.to(tokens.dtype))
        return output.reshape(hidden_states.shape)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], num_experts_per_tok: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    How far the load of experts, over all layers together, is from even.

    Args:
        router_logits (`tuple(torch.Tensor)` of shape `(B * T, E)`): Of each sparse layer.
        num_experts_per_tok (`int`): K.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 = valid; padding does not count.

    Returns:
        `torch.Tensor` of shape `()`: K where the load is even, up to E where it is not.

    Source: Switch Transformers (https://huggingface.co/papers/2101.03961), equations 4 to 6, summed over the K choices
    as the library's mixtures do.
    """
    device = router_logits[0].device
    logits = torch.cat([layer.to(device) for layer in router_logits]).float()  # (L * N, E)
    probabilities = torch.softmax(logits, dim=-1)
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(num_experts_per_tok, dim=-1).indices, 1.0)
    if attention_mask is None:
        weights = torch.ones(len(logits), 1, dtype=logits.dtype, device=device)
    else:
        weights = attention_mask.to(device, logits.dtype).reshape(-1).repeat(len(router_logits)).unsqueeze(-1)
    load, probability = ((rows * weights).sum(dim=0) / weights.sum() for rows in (chosen, probabilities))  # (E,) each
    return logits.shape[-1] * (load * probability).sum()


__all__ = [
    "FeedForward",
    "UniMoELoraExperts",
    "UniMoESparseMoeBlock",
    "UniMoETopKRouter",
    "activation_name",
    "gated_weights",
    "load_balancing_loss",
    "merged_weights",
    "read_feed_forward",
]
