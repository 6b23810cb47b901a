"""Experts, blocks and routings, tiny, and what they must compute."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from uni_moe_hf import UniMoEConfig
from uni_moe_hf.hub.experts_uni_moe import (
    UniMoELoraExperts,
    UniMoESparseMoeBlock,
)


HIDDEN, INNER, RANK, EXPERTS = 16, 24, 8, 4


ROUTES = ["eager", "auto", "segmented", "grouped_mm", "batched_mm"]


both_bases = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


every_route = pytest.mark.parametrize("route", ROUTES)


def make_config(shared: bool = False, route: str = "eager", **fields) -> LlamaConfig:
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_experts": EXPERTS,
        "expert_lora_rank": RANK,
        "shared_expert_base": shared,
    }
    config = UniMoEConfig(text_config={**settings, **fields}).text_config
    config._experts_implementation = route  # as `from_pretrained` leaves it
    return config


def experts_of(config: LlamaConfig, mlp: type[nn.Module] = LlamaMLP) -> UniMoELoraExperts:
    return UniMoELoraExperts(config, mlp(config))


def block_of(config: LlamaConfig) -> UniMoESparseMoeBlock:
    return UniMoESparseMoeBlock(config, LlamaMLP(config))


def make_experts(shared: bool = False, route: str = "eager", **fields) -> UniMoELoraExperts:
    """Random experts in evaluation mode, all factors of LoRA included."""
    experts = experts_of(make_config(shared, route, **fields)).eval()
    torch.manual_seed(1)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def on_route(experts: UniMoELoraExperts, route: str) -> UniMoELoraExperts:
    """A copy that takes another route."""
    twin = copy.deepcopy(experts)
    twin.experts_implementation = route
    return twin


def routed(num_tokens: int = 11, top_k: int = 2, hidden: int = HIDDEN, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """`(N, H)` tokens, and `(N, K)` experts and weights as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, hidden, generator=generator)
    logits, index = torch.randn(num_tokens, EXPERTS, generator=generator).topk(top_k)
    return tokens, index, logits.softmax(dim=-1)


ROUTINGS = {
    "random": routed(),
    "one-expert-per-token": routed(top_k=1),
    "every-expert-per-token": routed(top_k=EXPERTS),
    "single-token": routed(num_tokens=1),
    "idle-first-and-last-expert": (routed(5)[0], torch.tensor([[1, 2]] * 5), torch.full((5, 2), 0.5)),
    "all-to-the-last-expert": (routed(5)[0], torch.full((5, 1), EXPERTS - 1), torch.ones(5, 1)),
}


every_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


def with_lora(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Callable:
    """A frozen `nn.Linear` and the two of its LoRA, as one function."""
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in (weight, first, second)]
    for layer, w in zip(layers, (weight, first, second), strict=True):
        layer.weight = nn.Parameter(w.detach().clone())
    return lambda rows: layers[0](rows) + 16 / RANK * layers[2](layers[1](rows))


def naive_output(experts: UniMoELoraExperts, tokens, index, weights) -> torch.Tensor:
    """Token by token and expert by expert, out of one `nn.Linear` per projection and factor."""
    lora = experts.lora
    output = torch.zeros_like(tokens)
    for token, slot in itertools.product(range(index.shape[0]), range(index.shape[1])):
        expert = index[token, slot].item()
        if experts.shared_base:
            base = [experts.base.gate_proj.weight, experts.base.up_proj.weight, experts.base.down_proj.weight]
        else:
            stack = experts.gate_up_proj[expert]
            base = [stack[:INNER], stack[INNER:], experts.down_proj[expert]]
        first = [lora.gate_up_a[expert, :RANK], lora.gate_up_a[expert, RANK:], lora.down_a[expert]]
        second = [lora.gate_up_b[expert, :INNER], lora.gate_up_b[expert, INNER:], lora.down_b[expert]]
        gate, up, down = (with_lora(*factors) for factors in zip(base, first, second, strict=True))
        row = tokens[token]
        output[token] += weights[token, slot] * down(F.silu(gate(row)) * up(row))
    return output


def output_and_gradients(experts: UniMoELoraExperts, tokens, index, weights) -> dict[str, torch.Tensor]:
    """The result, and what its weighted sum sends back to inputs, router weights and every parameter."""
    tokens, weights = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    output = experts(tokens, index, weights)
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * probe).sum().backward()
    return {
        "output": output.detach(),
        "tokens": tokens.grad,
        "weights": weights.grad,
        **{name: parameter.grad for name, parameter in experts.named_parameters()},
    }


def assert_all_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


# Segments


def freeze(experts: UniMoELoraExperts) -> UniMoELoraExperts:
    """Experts as they are trained: LoRA learns, the rest does not, and the segmented route serves."""
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name.startswith("lora."))
    return experts
