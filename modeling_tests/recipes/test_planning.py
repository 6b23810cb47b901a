"""What a stage needs is estimated as it is counted: parameters, and bytes that layers keep for backward."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_config, tiny_model
from torch.autograd.graph import saved_tensors_hooks

from uni_moe_hf import UniMoEForConditionalGeneration, plan_stage, prepare_stage
from uni_moe_hf.recipes.planning import CHOICES, plan_choices, seconds_per_batch


ROWS, TOKENS = 2, 96


def dense(layers: int, **text) -> dict:
    return {"mlp_layer_types": ["dense"] * layers, "num_hidden_layers": layers} | text


def prepared(stage: str, layers: int, dtype: str, recompute: bool = False, **text):
    """A model as a stage trains it, its embeddings learning as if connectors fed them."""
    sparse = {"mlp_layer_types": ["sparse"] * layers, "num_hidden_layers": layers, "expert_lora_rank": 16}
    model = tiny_model((sparse if stage == "moe" else dense(layers)) | text).to(getattr(torch, dtype))
    model.config.stage = None if stage == "connectors" else "connectors"
    model.config.text_config.expert_activations = "recompute" if recompute else "save"
    config = model.config
    peft_config = prepare_stage(model, stage)
    model = model if peft_config is None else get_peft_model(model, peft_config)
    return model.train(), config


def kept(model, padded: bool) -> int:
    """Bytes of all different tensors that a forward pass keeps."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    ids = torch.randint(10, 60, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 2 :] = 1 - int(padded)
    feeding = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
    feeding.remove()
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("connectors", {}),
        ("connectors", {"padded": False}),
        ("connectors", {"model_type": "qwen3", "head_dim": 32}),
        ("experts", {"num_key_value_heads": 2}),
        ("moe", {}),
        ("moe", {"recompute": True}),
        ("moe", {"shared_expert_base": False, "num_experts": 3}),
        ("moe", {"num_experts_per_tok": 1}),
    ],
)
def test_what_layers_keep_is_estimated_within_a_twentieth(stage, settings, dtype):
    settings = {"padded": True, "shared_expert_base": True, **settings}
    padded, recompute = settings.pop("padded"), settings.pop("recompute", False)
    plans, counted = [], []
    for layers in (2, 4):
        model, config = prepared(stage, layers, dtype, recompute, **settings)
        counted.append(kept(model, padded))
        options = {"expert_activations": "recompute"} if recompute else {}
        plan = plan_stage(config, stage, ROWS, TOKENS, dtype, padded=padded, **options)
        plans.append(plan.kept)
    # The difference is two layers: what embeddings and head keep is another matter.
    assert plans[1] - plans[0] == pytest.approx(counted[1] - counted[0], rel=0.05)


@pytest.mark.parametrize("stage", ["connectors", "experts", "moe"])
def test_parameters_are_those_of_the_model(stage):
    model, config = prepared(stage, 2, "float32")
    plan = plan_stage(config, stage, lora_rank=64 if stage == "experts" else 16)
    assert plan.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for name, p in model.named_parameters() if ".original_module." not in name)
    assert plan.parameters == whole
    assert plan.trained == 12 * plan.trained_parameters


def test_every_choice_saves_what_it_says():
    config = tiny_config(dense(2, hidden_size=256, intermediate_size=512))
    plans = plan_choices(config, batch_size=4, num_tokens=256)
    assert list(plans) == list(CHOICES)
    totals = {choice: stages["moe"].total for choice, stages in plans.items()}
    order = ["float32", "bfloat16", "bfloat16, checkpointing", "and without towers", "and the LLM in 4 bits"]
    assert [totals[name] for name in order] == sorted((totals[name] for name in order), reverse=True)
    assert plans["bfloat16, experts recompute"]["moe"].kept < plans["bfloat16"]["moe"].kept
    own = plans["bfloat16, checkpointing, own bases"]["moe"]
    assert own.weights > plans["bfloat16, checkpointing"]["moe"].weights


def test_dropout_keeps_less_on_a_gpu_and_there_is_no_runtime():
    config = tiny_config(dense(2))
    cpu, gpu = (plan_stage(config, "experts", device=device) for device in ("cpu", "cuda"))
    assert gpu.kept < cpu.kept and gpu.runtime == 0 < cpu.runtime and gpu.weights == cpu.weights


def test_more_rows_take_more_memory_and_arithmetic_but_no_more_weights():
    config = tiny_config(dense(2))
    one, four = plan_stage(config, "experts", 1), plan_stage(config, "experts", 4)
    assert four.weights == one.weights and four.kept > 3 * one.kept and four.flops > 3 * one.flops
    checkpointed = plan_stage(config, "experts", 4, gradient_checkpointing=True)
    assert checkpointed.kept < four.kept and checkpointed.flops > four.flops


def test_an_estimate_of_time_is_positive_and_grows():
    config = tiny_config(dense(2))
    small, large = (plan_stage(config, "experts", size, 512) for size in (1, 64))
    assert 0 < seconds_per_batch(small) < seconds_per_batch(large)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": "fourth"}, "There is no stage 'fourth'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"expert_activations": "lose"}, "must be 'save' or 'recompute'"),
        ({"device": "tpu"}, "must be 'cpu' or 'cuda'"),
    ],
)
def test_what_there_is_not_is_said(settings, words):
    stage = settings.pop("stage", "moe")
    with pytest.raises(ValueError, match=words):
        plan_stage(tiny_config(dense(2)), stage, **settings)


def test_planning_loads_no_weights(monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(UniMoEForConditionalGeneration, "from_pretrained", loaded)
    plan = plan_stage(tiny_config(dense(2, hidden_size=4096, intermediate_size=11008)), "connectors")
    assert plan.parameters > 3e8
