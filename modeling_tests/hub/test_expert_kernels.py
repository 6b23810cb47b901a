"""Routes by which experts are computed, and the rule that chooses one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_experts import (
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    assert_all_close,
    both_bases,
    every_route,
    freeze,
    make_experts,
    on_route,
    output_and_gradients,
    routed,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from uni_moe_hf.hub import expert_kernels_uni_moe
from uni_moe_hf.hub.expert_kernels_uni_moe import ExpertsRouteMixin, choose_route


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
