"""Router, LoRA experts and their kernels: every route against a naive network and against PEFT."""

import copy
import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, inject_adapter_in_model
from tiny import EXACT, ROUNDING, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from uni_moe_hf import UniMoEConfig
from uni_moe_hf.hub import compat_uni_moe, expert_kernels_uni_moe, expert_segments_uni_moe
from uni_moe_hf.hub.expert_kernels_uni_moe import ExpertsRouteMixin, choose_route
from uni_moe_hf.hub.experts_uni_moe import (
    UniMoELoraExperts,
    UniMoESparseMoeBlock,
    UniMoETopKRouter,
    load_balancing_loss,
)


HIDDEN, INNER, RANK, EXPERTS = 16, 24, 8, 4
ROUTES = ["eager", "auto", "segmented", "grouped_mm", "batched_mm"]

both_bases = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
every_route = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


# Router


def make_router(**fields) -> UniMoETopKRouter:
    router = UniMoETopKRouter(make_config(**fields))
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(2))
    return router


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_router_equals_softmax_over_all_experts_then_top_k_then_renormalise(top_k):
    router = make_router(num_experts_per_tok=top_k)
    tokens = torch.randn(50, HIDDEN)
    logits, weights, index = router(tokens)

    kept, expected_index = (tokens @ router.weight.T).softmax(dim=-1).topk(top_k)
    torch.testing.assert_close(logits, tokens @ router.weight.T, **ROUNDING)
    torch.testing.assert_close(weights, kept / kept.sum(dim=-1, keepdim=True), **ROUNDING)
    assert torch.equal(index, expected_index)


def test_router_weights_sum_to_one_over_distinct_experts_in_range():
    _, weights, index = make_router()(10 * torch.randn(200, HIDDEN))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(200), **ROUNDING)
    assert index.dtype == torch.int64 and index.min() >= 0 and index.max() < EXPERTS
    assert (index[:, 0] != index[:, 1]).all()
    assert (weights >= 0).all()


def test_router_computes_in_float32_for_bf16_tokens_and_weights():
    router = make_router().to(torch.bfloat16)
    tokens = torch.randn(50, HIDDEN).to(torch.bfloat16)
    logits, weights, _ = router(tokens)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, tokens.float() @ router.weight.float().T, **ROUNDING)


def test_router_computes_in_float32_under_autocast():
    router, tokens = make_router(), torch.randn(50, HIDDEN)
    expected = router(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(tokens, router.weight).dtype == torch.bfloat16
        actual = router(tokens)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_router_dtype_lowers_the_logits():
    logits, *_ = make_router(router_dtype="bfloat16")(torch.randn(5, HIDDEN))
    assert logits.dtype == torch.bfloat16


# Experts


@both_bases
@every_route
@every_routing
def test_every_route_equals_a_naive_network(shared, route, routing):
    experts = make_experts(shared, route)
    with torch.no_grad():
        expected = naive_output(experts, *routing)
        torch.testing.assert_close(experts(*routing), expected, atol=1e-5, rtol=1e-5)


@both_bases
@pytest.mark.parametrize("route", ROUTES[1:])
@every_routing
def test_every_route_gives_the_eager_output_and_gradients(shared, route, routing):
    experts = make_experts(shared)
    expected = output_and_gradients(experts, *routing)
    actual = output_and_gradients(on_route(experts, route), *routing)
    assert_all_close(actual, expected, atol=1e-5, rtol=1e-5)


@both_bases
@pytest.mark.parametrize("route", ROUTES[1:])
def test_every_route_gives_the_eager_output_and_gradients_in_bf16(shared, route):
    """Within 5 % of each tensor's largest value: bf16 keeps 8 bits and the routes round at different places."""
    experts = make_experts(shared).to(torch.bfloat16)
    tokens, index, weights = routed()
    routing = tokens.to(torch.bfloat16), index, weights.to(torch.bfloat16)
    expected = output_and_gradients(experts, *routing)
    actual = output_and_gradients(on_route(experts, route), *routing)
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.bfloat16
        error = (actual[name].float() - tensor.float()).abs().max()
        assert error <= 0.05 * tensor.float().abs().max(), f"{name}: {error}"


@both_bases
@every_route
def test_only_lora_learns_when_the_base_is_frozen(shared, route):
    experts = make_experts(shared, route)
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name.startswith("lora."))
    expected = output_and_gradients(on_route(experts, "eager"), *routed())
    actual = output_and_gradients(experts, *routed())
    learned = {name: tensor for name, tensor in actual.items() if tensor is not None}
    assert set(learned) == {"output", "tokens", "weights", *(f"lora.{n}" for n, _ in experts.lora.named_parameters())}
    assert_all_close(learned, {name: expected[name] for name in learned}, atol=1e-5, rtol=1e-5)


@both_bases
@every_route
def test_idle_expert_gets_zero_gradients(shared, route):
    gradients = output_and_gradients(make_experts(shared, route), *ROUTINGS["idle-first-and-last-expert"])
    for name in ("gate_up_a", "gate_up_b", "down_a", "down_b"):
        gradient = gradients[f"lora.{name}"]
        assert (gradient[[0, 3]] == 0).all() and (gradient[[1, 2]] != 0).any()


@both_bases
@every_route
def test_no_tokens_give_no_rows(shared, route):
    routing = torch.zeros(0, HIDDEN), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert make_experts(shared, route)(*routing).shape == (0, HIDDEN)


@both_bases
@every_route
def test_lora_with_zero_second_factor_equals_the_frozen_network(shared, route):
    experts = make_experts(shared, route)
    nn.init.zeros_(experts.lora.gate_up_b)
    nn.init.zeros_(experts.lora.down_b)
    tokens, index, weights = routed()
    if shared:
        expected = experts.base(tokens)
    else:
        plain = experts_of(make_config(expert_lora_rank=0)).eval()
        plain.load_state_dict({"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj})
        expected = plain(tokens, index, weights)
    torch.testing.assert_close(experts(tokens, index, weights), expected, **ROUNDING)


@every_route
def test_single_shared_expert_without_lora_is_the_dense_network(route):
    experts = make_experts(True, route, num_experts=1, num_experts_per_tok=1, expert_lora_rank=0)
    tokens = torch.randn(3, HIDDEN)
    output = experts(tokens, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    torch.testing.assert_close(output, experts.base(tokens), **ROUNDING)


@both_bases
def test_lora_kept_in_float32_serves_bf16_experts(shared):
    """As PEFT keeps what it trains: the result is bf16, the gradients stay float32."""
    experts = make_experts(shared, "grouped_mm").to(torch.bfloat16)
    experts.lora.float()
    tokens, index, weights = routed()
    output = experts(tokens.to(torch.bfloat16), index, weights.to(torch.bfloat16))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in experts.lora.parameters())


@both_bases
def test_expert_equals_a_dense_network_wrapped_by_peft(shared):
    torch.manual_seed(3)
    dense = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=1))
    experts = make_experts(shared, expert_lora_alpha=20)
    chosen, projections = 2, ("gate_proj", "up_proj", "down_proj")
    with torch.no_grad():
        if shared:
            experts.base.load_state_dict(dense.state_dict())
        else:
            experts.gate_up_proj[chosen] = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
            experts.down_proj[chosen] = dense.down_proj.weight

        adapter = LoraConfig(r=RANK, lora_alpha=20, target_modules=list(projections), init_lora_weights=False)
        adapted = inject_adapter_in_model(adapter, dense)
        gate, up, down = (getattr(adapted, name) for name in projections)
        factors = [(p.lora_A["default"].weight, p.lora_B["default"].weight) for p in (gate, up, down)]
        experts.lora.gate_up_a[chosen] = torch.cat([factors[0][0], factors[1][0]])
        experts.lora.gate_up_b[chosen] = torch.cat([factors[0][1], factors[1][1]])
        experts.lora.down_a[chosen], experts.lora.down_b[chosen] = factors[2]

        tokens = torch.randn(9, HIDDEN)
        output = experts(tokens, torch.full((9, 1), chosen), torch.ones(9, 1))
        torch.testing.assert_close(output, adapted(tokens), atol=1e-5, rtol=1e-5)


# Kernels


@pytest.fixture
def grouped_products(monkeypatch):
    """The list of grouped products that were computed, one shape each."""
    calls, original = [], expert_kernels_uni_moe.grouped_linear

    def spy(rows, weight, offsets):
        calls.append(tuple(weight.shape))
        return original(rows, weight, offsets)

    monkeypatch.setattr(expert_kernels_uni_moe, "grouped_linear", spy)
    return calls


@both_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligned_experts_use_grouped_products(shared, dtype, grouped_products):
    experts = make_experts(shared, "grouped_mm").to(dtype)
    tokens, index, weights = routed()
    experts(tokens.to(dtype), index, weights.to(dtype))
    frozen = [] if shared else [(EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)]
    lora = [(EXPERTS, 2 * RANK, HIDDEN), (EXPERTS, RANK, INNER), (EXPERTS, HIDDEN, RANK)]
    assert sorted(grouped_products) == sorted(frozen + lora + 2 * [(EXPERTS, INNER, RANK)])


@both_bases
@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"expert_lora_rank": 6}, torch.float32),
        ({"hidden_size": 18}, torch.float32),
        ({"intermediate_size": 26}, torch.float32),
        ({"expert_lora_rank": 4}, torch.bfloat16),
        ({}, torch.float64),
    ],
    ids=["rank", "hidden", "inner", "bf16-rank", "float64"],
)
def test_unaligned_experts_fall_back_to_eager(shared, fields, dtype, grouped_products):
    experts = make_experts(shared, "grouped_mm", **fields).to(dtype)
    tokens, index, weights = routed(hidden=fields.get("hidden_size", HIDDEN))
    routing = tokens.to(dtype), index, weights.to(dtype)
    actual = output_and_gradients(experts, *routing)
    expected = output_and_gradients(on_route(experts, "eager"), *routing)
    assert grouped_products == []
    assert_all_close(actual, expected, atol=0, rtol=0)


@both_bases
@pytest.mark.parametrize("fields", [{"expert_lora_rank": 6}, {"hidden_size": 18}, {"intermediate_size": 26}], ids=str)
def test_batched_products_need_no_alignment(shared, fields):
    experts = make_experts(shared, **fields)
    routing = routed(hidden=fields.get("hidden_size", HIDDEN))
    actual = output_and_gradients(on_route(experts, "batched_mm"), *routing)
    assert_all_close(actual, output_and_gradients(experts, *routing), atol=1e-5, rtol=1e-5)


@both_bases
@every_route
def test_experts_run_under_autocast(shared, route):
    """Within 5 % of the largest value of the float32 result."""
    experts = make_experts(shared, route)
    expected = experts(*routed())
    with torch.autocast("cpu", torch.bfloat16):
        actual = experts(*routed())
    assert (actual.float() - expected).abs().max() <= 0.05 * expected.abs().max()


# Segments


def freeze(experts: UniMoELoraExperts) -> UniMoELoraExperts:
    """Experts as they are trained: LoRA learns, the rest does not, and the segmented route serves."""
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name.startswith("lora."))
    return experts


both_activations = pytest.mark.parametrize("activations", ["save", "recompute"])


@both_bases
@both_activations
@every_routing
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_segments_give_the_eager_output_and_gradients_in_float64(shared, activations, routing, act):
    experts = freeze(make_experts(shared, expert_activations=activations, hidden_act=act).double())
    tokens, index, weights = routing
    routing = tokens.double(), index, weights.double()
    expected = output_and_gradients(experts, *routing)
    assert choose_route(on_route(experts, "auto"), tokens) == "segmented"
    assert_all_close(output_and_gradients(on_route(experts, "auto"), *routing), expected, atol=1e-12, rtol=1e-12)


@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("draw", range(12))
def test_segments_of_random_shapes_give_the_eager_gradients_of_float64(activations, dtype, draw):
    """Within 1e-5 of each tensor's norm in float32; in half precision within four times eager's rounding and 1 %."""
    pick = random.Random(draw).choice
    sizes = {
        "hidden_size": pick([8, 40, 130]),
        "intermediate_size": pick([12, 130, 700]),
        "num_experts": pick([1, 3, 16]),
        "expert_lora_rank": pick([0, 1, 8, 32]),
        "hidden_act": pick(["silu", "gelu_pytorch_tanh", "gelu"]),
    }
    sizes["num_experts_per_tok"] = pick(range(1, min(3, sizes["num_experts"]) + 1))
    config = make_config(pick([False, True]), "eager", expert_activations=activations, **sizes)
    experts = experts_of(config, pick([LlamaMLP, Phi3MLP]))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts = freeze(experts.to(dtype))
    count, hidden = pick([1, 9, 50, 400]), sizes["hidden_size"]
    skew = pick([0.0, 1.0, 50.0]) * torch.arange(sizes["num_experts"])  # at 50 all tokens want the same experts
    logits, index = (torch.randn(count, sizes["num_experts"]) + skew).topk(sizes["num_experts_per_tok"])
    routing = torch.randn(count, hidden).to(dtype), index, logits.softmax(dim=-1).to(dtype)

    exact = copy.deepcopy(experts).double()
    expected = output_and_gradients(exact, routing[0].double(), index, routing[2].double())
    actual = output_and_gradients(on_route(experts, "auto"), *routing)
    with torch.no_grad():
        actual["few"] = on_route(experts, "auto")(*(tensor[:8] for tensor in routing))
    expected["few"] = expected["output"][:8]
    eager = output_and_gradients(experts, *routing)
    eager["few"] = eager["output"][:8]
    for name, tensor in expected.items():
        if tensor is not None:
            assert actual[name].dtype == dtype
            error, rounding = (
                (result[name].double() - tensor).norm() / tensor.norm().clamp(min=1e-9) for result in (actual, eager)
            )
            assert error <= (1e-5 if dtype == torch.float32 else 4 * rounding + 1e-2), f"{name}: {error}, {rounding}"


@both_bases
@both_activations
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gradients_of_segments_are_the_differences_of_their_output(shared, activations, dropout, act):
    """`gradcheck` in float64; with dropout, under one seed."""
    fields = {"hidden_size": 6, "intermediate_size": 10, "expert_lora_rank": 2, "hidden_act": act}
    experts = make_experts(shared, "auto", expert_lora_dropout=dropout, expert_activations=activations, **fields)
    experts = freeze(experts.double()).train()
    tokens, index, weights = routed(9, hidden=6)

    def output(tokens, weights, *factors):
        torch.manual_seed(0)
        lora = dict(zip((name for name, _ in experts.lora.named_parameters()), factors, strict=True))
        names = {f"lora.{name}": factor for name, factor in lora.items()}
        return torch.func.functional_call(experts, names, (tokens, index, weights))

    inputs = [tokens.double(), weights.double(), *experts.lora.parameters()]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(output, inputs)


@both_bases
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_give_the_same_gradients_under_dropout(shared, reentrant):
    experts = freeze(make_experts(shared, "auto", expert_lora_dropout=0.4)).train()
    torch.manual_seed(5)
    expected = output_and_gradients(experts, *routed())
    torch.manual_seed(5)
    layer = copy.copy(experts)
    layer.forward = lambda *args: checkpoint(experts, *args, use_reentrant=reentrant)
    assert_all_close(output_and_gradients(layer, *routed()), expected, atol=0, rtol=0)


@both_bases
def test_what_segments_keep_is_seen_by_hooks_and_is_the_input_alone_when_recomputing(shared):
    """Kept beside weights and routing: tokens; when saving also gate, up (of tokens or of rows), low-rank rows."""
    tokens, index, weights = routed(64)
    sizes = {}
    for activations in ("save", "recompute"):
        experts = freeze(make_experts(shared, "auto", expert_activations=activations))
        own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        kept = {}

        def pack(tensor, own=own, kept=kept):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = experts(tokens.clone().requires_grad_(), index, weights)
        sizes[activations] = sum(kept.values())
        output.sum().backward()
    assert sizes["recompute"] == tokens.numel() + weights.numel()
    rows = 64 if shared else 128
    extra = sizes["save"] - sizes["recompute"]
    assert rows * 2 * INNER + 128 * 3 * RANK <= extra <= 1.3 * (rows * 2 * INNER + 128 * 3 * RANK)  # padding


@both_bases
def test_frozen_weights_get_neither_gradients_nor_copies(shared):
    experts = freeze(make_experts(shared, "auto", hidden_size=256, intermediate_size=384))
    frozen = min(p.numel() for name, p in experts.named_parameters() if not name.startswith("lora."))
    tokens, index, weights = routed(4, hidden=256)
    with torch.profiler.profile(profile_memory=True) as profile:
        experts(tokens.clone().requires_grad_(), index, weights).sum().backward()
    events = profile.profiler.kineto_results.events()
    assert 0 < max(e.nbytes() for e in events if e.name() == "[memory]") < frozen * 4 // 2
    assert all(p.grad is None for name, p in experts.named_parameters() if not name.startswith("lora."))


@both_bases
@both_activations
def test_frozen_lora_gets_no_gradients_and_changes_none(shared, activations):
    experts = freeze(make_experts(shared, "auto", expert_activations=activations))
    expected = output_and_gradients(experts, *routed())
    actual = output_and_gradients(copy.deepcopy(experts).requires_grad_(False), *routed())
    for name in ("output", "tokens", "weights"):
        assert torch.equal(actual.pop(name), expected[name])
    assert set(actual.values()) == {None}


@both_bases
def test_a_token_that_overflows_spoils_itself_alone(shared):
    experts = freeze(make_experts(shared, "auto"))
    tokens, index, weights = routed()
    spoiled = tokens.clone()
    spoiled[0] = torch.inf
    expected = output_and_gradients(experts, tokens, index, weights)
    actual = output_and_gradients(experts, spoiled, index, weights)
    for name in ("output", "tokens"):
        torch.testing.assert_close(actual[name][1:], expected[name][1:], **ROUNDING)
        assert actual[name][0].isnan().any()


@both_bases
@both_activations
def test_segments_repeat_bit_for_bit_and_may_be_sent_back_twice(shared, activations):
    experts = freeze(make_experts(shared, "auto", expert_activations=activations))
    tokens, index, weights = routed(50)
    tokens.requires_grad_()
    output = experts(tokens, index, weights)
    assert torch.equal(output, experts(tokens, index, weights))
    first, second = (torch.autograd.grad(output.sum(), tokens, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivatives_of_segments_are_refused():
    experts = freeze(make_experts(False, "auto"))
    tokens, index, weights = routed()
    tokens.requires_grad_()
    (grad,) = torch.autograd.grad(experts(tokens, index, weights).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@both_bases
@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_tokens_without_gradients_equal_eager(shared, count):
    experts = make_experts(shared)
    tokens, index, weights = routed(count)
    twice = index[:, :1].expand_as(index)  # both slots at one expert: no router does it, no answer may depend on it
    for chosen in (index, twice):
        with torch.no_grad():
            expected, actual = (layer(tokens, chosen, weights) for layer in (experts, on_route(experts, "auto")))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@both_bases
def test_autocast_of_segments_gives_the_gradients_of_eager(shared):
    """Within 5 % of each tensor's largest value; LoRA's gradients stay float32, as its weights are."""
    experts = freeze(make_experts(shared))
    results = []
    for route in ("eager", "auto"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(output_and_gradients(on_route(experts, route), *routed(50)))
    for name, tensor in results[0].items():
        if tensor is not None:
            assert results[1][name].dtype == tensor.dtype, name
            assert (results[1][name] - tensor).abs().max() <= 0.05 * tensor.abs().max(), name


def test_what_experts_keep_is_save_or_recompute():
    with pytest.raises(StrictDataclassError, match="expert_activations"):
        make_config(expert_activations="keep")


# The rule


@both_bases
def test_the_rule_takes_segments_unless_weights_must_be_called_or_learn(shared):
    tokens = routed()[0]
    experts = freeze(make_experts(shared, "auto"))
    assert choose_route(experts, tokens) == "segmented"
    learning = make_experts(shared, "auto")
    assert choose_route(learning, tokens) == "grouped_mm"
    with torch.no_grad():
        assert choose_route(learning, tokens) == "segmented"
    assert choose_route(freeze(make_experts(shared, "auto", hidden_act="relu")), tokens) == "grouped_mm"
    if shared:
        hooked, wrapped = copy.deepcopy(experts), copy.deepcopy(experts)
        hooked.base.up_proj.register_forward_hook(lambda *args: None)
        assert choose_route(hooked, tokens) == "grouped_mm"
        inject_adapter_in_model(LoraConfig(target_modules=["down_proj"]), wrapped.base)
        assert choose_route(wrapped, tokens) == "grouped_mm"


def test_the_rule_does_not_look_at_the_number_of_tokens_on_a_cpu_and_gathers_few_elsewhere(monkeypatch):
    experts = freeze(make_experts(False, "auto"))
    for question in ("_can_be_segmented", "_has_values"):
        monkeypatch.setattr(expert_kernels_uni_moe, question, lambda *args: True)
    few, many = (SimpleNamespace(device=torch.device("cuda"), shape=(count, HIDDEN)) for count in (8, 9))
    assert choose_route(experts, few) == choose_route(experts, many) == "segmented"
    with torch.no_grad():
        assert (choose_route(experts, few), choose_route(experts, many)) == ("batched_mm", "segmented")
        assert choose_route(experts, torch.zeros(1, HIDDEN)) == "segmented"


@both_bases
@pytest.mark.parametrize("count", [1, 50])
def test_shapes_are_found_without_values(shared, count):
    """On the meta device and with fake tensors, as size estimates and profilers do."""
    experts = freeze(make_experts(shared, "auto"))
    with torch.no_grad():
        assert copy.deepcopy(experts).to("meta")(*(t.to("meta") for t in routed(count))).shape == (count, HIDDEN)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert experts(*(mode.from_tensor(t) for t in routed(count))).shape == (count, HIDDEN)


@both_bases
@pytest.mark.parametrize("route", ["auto", "segmented"])
def test_what_segments_cannot_serve_goes_another_way_with_the_same_result(shared, route):
    experts = make_experts(shared)  # its base learns
    expected = output_and_gradients(experts, *routed())
    assert all(tensor is not None for tensor in expected.values())
    assert_all_close(output_and_gradients(on_route(experts, route), *routed()), expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_route_is_refused_by_name():
    with pytest.raises(ValueError, match='no `experts_implementation="fast"`; there are "eager", "auto"'):
        ExpertsRouteMixin().get_correct_experts_implementation("fast")
    assert ExpertsRouteMixin().get_correct_experts_implementation(None) == "auto"


# The private operator


@pytest.fixture
def forget_the_operator():
    compat_uni_moe.onednn_linear.cache_clear()
    yield
    compat_uni_moe.onednn_linear.cache_clear()


def wrong(rows, weight, *others):
    return rows @ weight.T + 1


def absent(*args):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("operator", [wrong, absent, None])
def test_a_private_operator_that_is_wrong_or_gone_is_not_used(operator, monkeypatch, forget_the_operator):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=operator) if operator else object())
    assert compat_uni_moe.onednn_linear() is None
    rows, weight = torch.randn(300, 200), torch.randn(100, 200)
    assert torch.equal(expert_segments_uni_moe._linear(rows, weight), F.linear(rows, weight))


def test_products_equal_the_public_ones_whatever_computes_them(monkeypatch, forget_the_operator):
    """1e-4 on sums of 200 products. Half precision, float64 and small products never take the private operator."""
    rows, weight, base = torch.randn(300, 200), torch.randn(100, 200), torch.randn(300, 100)
    torch.testing.assert_close(expert_segments_uni_moe._linear(rows, weight), rows @ weight.T, atol=1e-4, rtol=1e-4)
    turned = expert_segments_uni_moe._linear(rows, weight.T.contiguous().T)
    torch.testing.assert_close(turned, rows @ weight.T, atol=1e-4, rtol=1e-4)
    added = expert_segments_uni_moe._add_linear(base.clone(), rows, weight)
    torch.testing.assert_close(added, base + rows @ weight.T, atol=1e-4, rtol=1e-4)
    assert not expert_segments_uni_moe._prefers_onednn(rows.bfloat16(), weight.bfloat16())
    assert not expert_segments_uni_moe._prefers_onednn(rows.double(), weight.double())
    assert not expert_segments_uni_moe._prefers_onednn(rows[:20], weight[:20])
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not expert_segments_uni_moe._prefers_onednn(rows, weight)


def test_rows_are_padded_to_sixteen_or_more_sizes_per_doubling():
    like = torch.zeros(1)
    sizes = [expert_segments_uni_moe._padded(count, like) for count in range(1, 4097)]
    assert all(count <= size < 1.07 * count + 4 for count, size in enumerate(sizes, start=1))
    assert len({size for size in sizes if 1024 < size <= 2048}) == 16
    assert expert_segments_uni_moe._padded(37, like.double()) == 37


# Dropout


@both_bases
@every_route
def test_dropout_acts_in_training_only(shared, route):
    experts = make_experts(shared, route, expert_lora_dropout=0.5)
    without = make_experts(shared, route)
    torch.testing.assert_close(experts(*routed()), without(*routed()), atol=0, rtol=0)
    experts.train()
    first, second = experts(*routed()), experts(*routed())
    assert not torch.allclose(first, second)


@both_bases
@every_route
def test_dropout_spares_the_frozen_network(shared, route):
    experts = make_experts(shared, route, expert_lora_dropout=0.5)
    nn.init.zeros_(experts.lora.gate_up_b)
    nn.init.zeros_(experts.lora.down_b)
    expected = experts(*routed())
    torch.testing.assert_close(experts.train()(*routed()), expected, atol=0, rtol=0)


@both_bases
@every_route
def test_full_dropout_leaves_the_frozen_network(shared, route):
    """Dropout stands before every first factor, so at 1.0 nothing gets through LoRA."""
    experts = make_experts(shared, route, expert_lora_dropout=1.0).train()
    actual = experts(*routed())
    nn.init.zeros_(experts.lora.gate_up_b)
    nn.init.zeros_(experts.lora.down_b)
    torch.testing.assert_close(actual, experts.eval()(*routed()), atol=0, rtol=0)


@pytest.mark.parametrize("probability", [1e-4, 0.05, 0.5, 0.97])
def test_every_element_is_dropped_with_the_same_probability(probability):
    """Counts of 40 draws within five standard deviations: over all elements, and over the first and last hundred."""
    dropout, rows = expert_segments_uni_moe._Dropout(probability, seed=0), torch.ones(50, 400)
    draws = torch.zeros(rows.numel())
    for _ in range(40):
        dropped = dropout.draw(rows)
        assert (dropped.diff() > 0).all() and (0 <= dropped).all() and (dropped < rows.numel()).all()
        draws += expert_segments_uni_moe._drop(rows, dropped).flatten() == 0
    for part in (draws, draws[:100], draws[-100:]):
        expected, spread = 40 * len(part) * probability, (40 * len(part) * probability * (1 - probability)) ** 0.5
        assert abs(part.sum() - expected) < 5 * spread + 1
    assert torch.equal(rows, torch.ones_like(rows))  # of which a copy was changed


@both_bases
def test_dropout_keeps_the_mean(shared):
    """Of 600 outputs, in their own spread: within 0.5; a wrong scale gives 1.5."""
    experts = make_experts(shared, "auto", expert_lora_dropout=0.5)
    with torch.no_grad():
        expected, outputs = experts(*routed()), []
        experts.train()
        for _ in range(600):
            outputs.append(experts(*routed()))
    errors = (torch.stack(outputs).mean(dim=0) - expected) / torch.stack(outputs).std(dim=0).clamp(min=1e-6)
    assert errors.square().mean().sqrt() < 0.5


# Merging


@both_bases
@every_route
def test_merged_experts_give_the_unmerged_output(shared, route):
    experts = make_experts(shared, route)
    expected = experts(*routed())
    experts.merge_lora()
    assert experts.lora is None and not experts.shared_base
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
        "down_proj": (EXPERTS, HIDDEN, INNER),
    }
    torch.testing.assert_close(experts(*routed()), expected, atol=1e-5, rtol=1e-5)


def test_merged_bf16_experts_hold_the_float32_sum_rounded_once():
    experts = make_experts().to(torch.bfloat16)
    lora = experts.lora
    down = experts.down_proj.float() + 16 / RANK * lora.down_b.float() @ lora.down_a.float()
    experts.merge_lora()
    assert torch.equal(experts.down_proj, down.to(torch.bfloat16))


@both_bases
def test_unmerging_restores_the_weights(shared):
    """Bit by bit with a shared base, but for rounding with own bases."""
    experts = make_experts(shared)
    before = copy.deepcopy(experts.state_dict())
    experts.merge_lora()
    experts.unmerge_lora()
    assert experts.shared_base == shared
    assert_all_close(experts.state_dict(), before, **(EXACT if shared else ROUNDING))


@both_bases
@pytest.mark.parametrize("trains", [False, True])
def test_merged_weights_train_where_the_frozen_ones_did(shared, trains):
    experts = make_experts(shared).requires_grad_(trains)
    experts.merge_lora()
    assert {parameter.requires_grad for parameter in experts.parameters()} == {trains}


@both_bases
def test_unmerging_restores_what_may_be_trained(shared):
    experts = make_experts(shared)
    before = {name: parameter.requires_grad for name, parameter in experts.named_parameters()}
    experts.merge_lora()
    experts.unmerge_lora()
    assert {name: parameter.requires_grad for name, parameter in experts.named_parameters()} == before


@both_bases
def test_unmerging_works_after_a_change_of_dtype(shared):
    experts = make_experts(shared)
    experts.merge_lora()
    experts.to(torch.bfloat16)
    experts.unmerge_lora()
    tokens, index, weights = routed()
    output = experts(tokens.to(torch.bfloat16), index, weights.to(torch.bfloat16))
    assert {parameter.dtype for parameter in experts.parameters()} == {output.dtype} == {torch.bfloat16}


@both_bases
def test_merging_twice_is_refused_and_changes_nothing(shared):
    experts = make_experts(shared)
    experts.merge_lora()
    merged = copy.deepcopy(experts.state_dict())
    with pytest.raises(ValueError, match="nothing to merge"):
        experts.merge_lora()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in experts.state_dict().items())


@both_bases
def test_unmerging_what_was_not_merged_is_refused(shared):
    experts = make_experts(shared)
    with pytest.raises(ValueError, match="not merged"):
        experts.unmerge_lora()
    experts.merge_lora()
    experts.unmerge_lora()
    with pytest.raises(ValueError, match="not merged"):
        experts.unmerge_lora()


# Block


@both_bases
@every_route
def test_block_sends_every_token_to_its_experts(shared, route):
    torch.manual_seed(4)
    block = block_of(make_config(shared, route)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden_states = torch.randn(3, 5, 2 * HIDDEN)[..., ::2]  # not contiguous
    output = block(hidden_states)

    tokens = hidden_states.reshape(-1, HIDDEN)
    kept, index = (tokens @ block.gate.weight.T).softmax(dim=-1).topk(2)
    expected = naive_output(block.experts, tokens, index, kept / kept.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(output, expected.view(3, 5, HIDDEN), atol=1e-5, rtol=1e-5)


@both_bases
def test_block_keeps_the_dtype_of_its_input(shared):
    block = block_of(make_config(shared, "grouped_mm")).to(torch.bfloat16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    output = block(torch.randn(2, 3, HIDDEN, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.parametrize("route", ["eager", "auto", "segmented", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_routes_to_experts_of_other_processes_count_for_nothing(route, tokens):
    """Expert parallelism marks them with the number behind the last, and weight 0."""
    model = tiny_model({"shared_expert_base": False})
    model.set_experts_implementation(route)
    experts = next(iter(model._experts()))
    rows = torch.randn(tokens, experts.hidden_size)
    index = torch.stack([torch.arange(tokens) % 4, (torch.arange(tokens) + 1) % 4], dim=1)
    weights = torch.rand(tokens, 2)
    elsewhere = torch.arange(tokens) % 3 == 0
    weights[elsewhere, 1] = 0.0
    with torch.no_grad():
        expected = experts(rows, index, weights)
        index[elsewhere, 1] = experts.num_experts
        torch.testing.assert_close(experts(rows, index, weights), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("top_k", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.float16)], ids=str)
def test_the_load_balancing_loss_is_the_librarys(top_k, dtype, masked):
    """Within 1e-6 in float32; of half-precision logits, of any number, as of the same numbers in float32."""
    layers = tuple(torch.randn(4 * 9000, 4).to(dtype) for _ in range(3))
    mask = (torch.rand(4, 9000) > 0.3).long() if masked else None
    expected = load_balancing_loss_func(tuple(layer.float() for layer in layers), 4, top_k, mask)
    torch.testing.assert_close(load_balancing_loss(layers, top_k, mask), expected, atol=1e-5, rtol=1e-5)


def test_the_load_balancing_loss_lies_between_k_and_e():
    even, one = torch.zeros(400, 4), torch.zeros(400, 4)
    even[range(400), torch.arange(400) % 4] = even[range(400), (torch.arange(400) + 1) % 4] = 50.0
    one[:, 1] = 100.0
    assert load_balancing_loss((even,), 2).item() == pytest.approx(2.0)
    assert load_balancing_loss((one,), 2).item() == pytest.approx(4.0)
