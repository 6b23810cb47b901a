"""The layers that `bench_experts.py` compares ours with, all built from one set of weights."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from uni_moe_hf import UniMoEConfig
from uni_moe_hf.hub.expert_segments_uni_moe import ACTIVATIONS, _add_linear, _gated, _gated_backward, _linear
from uni_moe_hf.hub.experts_uni_moe import UniMoELoraExperts


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def ours(shape: dict, **fields) -> UniMoELoraExperts:
    """Our experts with random weights; the frozen ones do not learn. All other layers copy theirs."""
    settings = {"num_hidden_layers": 1, "num_attention_heads": 1, "expert_lora_alpha": 2 * shape["expert_lora_rank"]}
    config = UniMoEConfig(text_config={**settings, **shape, **fields}).text_config
    experts = UniMoELoraExperts(config, LlamaMLP(config))
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_("lora" in name)
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts


def factors_of(experts: UniMoELoraExperts, expert: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both LoRA factors of each projection of one expert."""
    lora, rank, inner = experts.lora, experts.lora_rank, experts.intermediate_size
    first, second = lora.gate_up_a[expert], lora.gate_up_b[expert]
    return {
        "gate_proj": (first[:rank], second[:inner]),
        "up_proj": (first[rank:], second[inner:]),
        "down_proj": (lora.down_a[expert], lora.down_b[expert]),
    }


def frozen_of(experts: UniMoELoraExperts, expert: int) -> dict[str, torch.Tensor]:
    """The frozen weight of each projection of one expert."""
    if experts.shared_base:
        return {name: getattr(experts.base, name).weight for name in PROJECTIONS}
    gate, up = experts.gate_up_proj[expert].chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj[expert]}


class OriginalExperts(nn.Module):
    """
    (b) A loop over experts whose linear layers PEFT wraps.

    Source: `MoE.forward` in `Uni_MoE_speech/model/moe/moe.py@f5e82dd`, retold; its scripts run it under gradient
    checkpointing.
    """

    def __init__(self, experts: UniMoELoraExperts, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        config, rank = experts.config, experts.lora_rank
        sizes = LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=1,
            hidden_act=config.hidden_act,
        )
        dtype = next(experts.parameters()).dtype
        self.experts = nn.ModuleList(LlamaMLP(sizes).to(dtype) for _ in range(config.num_experts))
        adapter = LoraConfig(r=rank, lora_alpha=config.expert_lora_alpha, target_modules=list(PROJECTIONS))
        get_peft_model(self, adapter, autocast_adapter_dtype=False)
        for index, mlp in enumerate(self.experts):
            frozen = frozen_of(experts, index)
            for name, (first, second) in factors_of(experts, index).items():
                layer = getattr(mlp, name)
                layer.base_layer.weight = nn.Parameter(frozen[name], requires_grad=False)
                layer.lora_A["default"].weight = nn.Parameter(first.detach().clone())
                layer.lora_B["default"].weight = nn.Parameter(second.detach().clone())

    def forward(self, tokens, index, weights):
        """As our experts."""
        if self.checkpointed:
            return checkpoint(self._loop, tokens, index, weights, use_reentrant=False)
        return self._loop(tokens, index, weights)

    def _loop(self, tokens, index, weights):
        results = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(index == number)
            results[token] += weights[token, slot, None] * expert(tokens[token])
        return results

    def lora_gradients(self) -> list[torch.Tensor]:
        """In the order of `FACTORS`, stacked as ours."""

        def grads(name: str, factor: str) -> list[torch.Tensor]:
            weights = [getattr(getattr(mlp, name), factor)["default"].weight for mlp in self.experts]
            return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]

        def stacked(factor: str) -> torch.Tensor:
            pairs = zip(grads("gate_proj", factor), grads("up_proj", factor), strict=True)
            return torch.stack([torch.cat(pair) for pair in pairs])

        downs = [torch.stack(grads("down_proj", factor)) for factor in ("lora_A", "lora_B")]
        return [stacked("lora_A"), stacked("lora_B"), *downs]


class MixtralPeftExperts(nn.Module):
    """(c) Transformers' stacked experts under PEFT's `target_parameters`, whose LoRA joins gate and up."""

    def __init__(self, experts: UniMoELoraExperts, implementation: str = "grouped_mm"):
        super().__init__()
        config = MixtralConfig(
            hidden_size=experts.hidden_size,
            intermediate_size=experts.intermediate_size,
            num_local_experts=experts.num_experts,
            hidden_act=experts.config.hidden_act,
        )
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config).to(next(experts.parameters()).dtype)
        if not experts.shared_base:
            self.experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach(), requires_grad=False)
            self.experts.down_proj = nn.Parameter(experts.down_proj.detach(), requires_grad=False)
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        adapter = LoraConfig(r=experts.lora_rank, target_modules=[], target_parameters=targets)
        get_peft_model(self, adapter, autocast_adapter_dtype=False)

    def forward(self, tokens, index, weights):
        """As our experts."""
        return self.experts(tokens, index, weights)


class MixLoraExperts(nn.Module):
    """
    (d) A shared base whose gate and up run once per token, its down once per routed row.

    Source: MixLoRA (https://huggingface.co/papers/2404.15159), section 3.3, retold.
    """

    def __init__(self, experts: UniMoELoraExperts):
        super().__init__()
        self.base, self.scaling, self.rank = experts.base, experts.lora_scaling, experts.lora_rank
        self.act_fn = experts.act_fn
        self.lora = nn.ParameterDict({n: nn.Parameter(getattr(experts.lora, n).detach().clone()) for n in FACTORS})

    def forward(self, tokens, index, weights):
        """As our experts."""
        base_gate, base_up = self.base.gate_proj(tokens), self.base.up_proj(tokens)
        results = torch.zeros_like(tokens)
        for number in range(self.lora["down_a"].shape[0]):
            token, slot = torch.where(index == number)
            rows = tokens[token]
            a_gate, a_up = self.lora["gate_up_a"][number].chunk(2)
            b_gate, b_up = self.lora["gate_up_b"][number].chunk(2)
            gate = base_gate[token] + self.scaling * F.linear(F.linear(rows, a_gate), b_gate)
            up = base_up[token] + self.scaling * F.linear(F.linear(rows, a_up), b_up)
            inner = self.act_fn(gate) * up
            low = F.linear(F.linear(inner, self.lora["down_a"][number]), self.lora["down_b"][number])
            results[token] += weights[token, slot, None] * (self.base.down_proj(inner) + self.scaling * low)
        return results

    def lora_gradients(self) -> list[torch.Tensor]:
        """In the order of `FACTORS`."""
        return [self.lora[name].grad for name in FACTORS]


class Dense(nn.Module):
    """(a) One frozen gated network through `F.linear`, on as many rows as the mixture's frozen products see."""

    def __init__(self, experts: UniMoELoraExperts):
        super().__init__()
        self.weights = [weight.detach().clone() for weight in frozen_of(experts, 0).values()]
        self.repeats = 1 if experts.shared_base else experts.config.num_experts_per_tok
        self.act_fn, self.activation = experts.act_fn, experts.activation

    def forward(self, tokens, index, weights):
        """As our experts, without routing."""
        gate, up, down = self.weights
        rows = tokens.repeat(self.repeats, 1)
        return F.linear(self.act_fn(F.linear(rows, gate)) * F.linear(rows, up), down)


class FastestDense(Dense):
    """(a) through the fastest product that this machine has: the limit."""

    def forward(self, tokens, index, weights):
        """As our experts, without routing."""
        return _FastestDense.apply(tokens.repeat(self.repeats, 1), *self.weights, ACTIVATIONS[self.activation])


class _FastestDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, gate_weight, up_weight, down_weight, activation):
        ctx.activation = activation
        gate, up = _linear(rows, gate_weight), _linear(rows, up_weight)
        ctx.save_for_backward(gate, up, gate_weight, up_weight, down_weight)
        return _linear(_gated(gate, up, activation, torch.empty_like(gate)), down_weight)

    @staticmethod
    def backward(ctx, grad_output):
        gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        ones = torch.ones_like(grad_output[:, :1])
        grad_inner, inner, grad_up = (
            _linear(grad_output, down_weight.t()),
            torch.empty_like(gate),
            torch.empty_like(up),
        )
        _, grad_gate, grad_up, _ = _gated_backward(grad_inner, gate, up, ones, ctx.activation, inner, grad_up)
        grad_rows = _add_linear(_linear(grad_gate, gate_weight.t()), grad_up, up_weight.t())
        return grad_rows, None, None, None, None


class DenseOnSameBytes(nn.Module):
    """(a) for decoding: a gated network as wide as the chosen experts together, so that it reads what they read."""

    def __init__(self, experts: UniMoELoraExperts, chosen: int):
        super().__init__()
        self.act_fn = experts.act_fn
        chosen = range(1 if experts.shared_base else chosen)
        parts = [frozen_of(experts, index) for index in chosen]
        self.gate, self.up, self.down = (
            torch.cat([part[name] for part in parts], dim=1 if name == "down_proj" else 0).detach()
            for name in PROJECTIONS
        )

    def forward(self, tokens, index, weights):
        """As our experts, without routing."""
        return F.linear(self.act_fn(F.linear(tokens, self.gate)) * F.linear(tokens, self.up), self.down)
