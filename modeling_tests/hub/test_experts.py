"""Router, LoRA experts and their kernels: every route against a naive network and against PEFT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from tiny import EXACT, ROUNDING, tiny_model
from tiny_experts import (
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    ROUTES,
    ROUTINGS,
    assert_all_close,
    block_of,
    both_bases,
    every_route,
    every_routing,
    experts_of,
    make_config,
    make_experts,
    naive_output,
    on_route,
    output_and_gradients,
    routed,
)
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from uni_moe_hf.hub.experts_uni_moe import (
    UniMoETopKRouter,
    load_balancing_loss,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
