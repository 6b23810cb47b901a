"""Any LLM as the decoder: each trait in full, every family on request, and what is refused."""

import copy
import pickle

import pytest
import torch
from families import CHECKS, FAMILIES, REPRESENTATIVES, SMALL, gap, grown, plain_llm, words
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from uni_moe_hf import UniMoEConfig, UniMoEForConditionalGeneration, from_pretrained_parts, grow_experts
from uni_moe_hf.hub import decoder_uni_moe
from uni_moe_hf.hub.decoder_uni_moe import adjust_logits, build_decoder, sparse_decoder
from uni_moe_hf.hub.experts_uni_moe import activation_name, read_feed_forward
from uni_moe_hf.mixtures import parts
from uni_moe_hf.mixtures.expert_adapters import export_expert, read_expert


# Enough of every trait in every run; the rest of the table is slow.
QUICK = [(name, check) for name in REPRESENTATIVES for check in CHECKS if not check.startswith(("saved", "three"))]
QUICK += [("Phi-3", "saved, no package, saved")]
QUICK += [(name, "three stages, fused loss") for name in ("Gemma 2", "Granite")]
SLOW = [(name, check) for name in FAMILIES for check in CHECKS if (name, check) not in QUICK]


@pytest.mark.parametrize(
    ("name", "check"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)], ids=lambda text: text
)
def test_an_llm_of_the_family_becomes_the_decoder_without_loss(name, check, tmp_path):
    assert CHECKS[check](name, tmp_path)


def test_the_decoder_is_the_librarys_own_class_made_once():
    model = tiny_model()
    decoder = type(model.model.language_model)
    assert decoder.__name__ == "UniMoELlamaModel" and issubclass(decoder, LlamaModel)
    assert decoder is sparse_decoder(LlamaModel) and decoder.forward is LlamaModel.forward
    twin = pickle.loads(pickle.dumps(build_decoder(tiny_config().text_config)))
    assert type(twin) is decoder
    with pytest.raises(AttributeError, match="UniMoENothing"):
        _ = decoder_uni_moe.UniMoENothing


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3"])
def test_layers_are_sparse_where_the_config_says_so(kind):
    text = {**SMALL, "model_type": kind, "mlp_layer_types": ["dense", "sparse"], "num_experts": 3}
    model = UniMoEForConditionalGeneration(UniMoEConfig(text_config=text))
    dense, sparse = (layer.mlp for layer in model.model.language_model.layers)
    assert type(dense).__name__.endswith("MLP") and type(sparse).__name__ == "UniMoESparseMoeBlock"
    assert sparse.experts.gate_up_proj.shape == (3, 256, 64) and sparse.experts.down_proj.shape == (3, 64, 128)
    outputs = model(input_ids=words(), output_router_logits=True)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(40, 3)]
    for weight in (sparse.gate.weight, sparse.experts.gate_up_proj, sparse.experts.lora.gate_up_a):
        assert 0.005 < weight.std() < 0.2
    assert not sparse.experts.lora.gate_up_b.any()


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_activations_may_be_kept_or_computed_again(name):
    """Checkpointing and recomputing change memory, not gradients; router logits carry them either way."""
    model = grown(from_pretrained_parts(plain_llm(name)), lora_dropout=0.0)
    model.config.text_config.router_aux_loss_coef = 0.1

    def gradients(change) -> dict[str, torch.Tensor]:
        twin = copy.deepcopy(model).train()
        change(twin)
        twin(input_ids=words(), labels=words(), output_router_logits=True).loss.backward()
        return {key: p.grad for key, p in twin.named_parameters() if "lora" in key or "mlp.gate" in key}

    def recompute(twin):
        twin.config.text_config.expert_activations = "recompute"

    wanted = gradients(lambda twin: None)
    assert all(tensor.abs().sum() > 0 for tensor in wanted.values())
    for change in (lambda twin: twin.gradient_checkpointing_enable({"use_reentrant": False}), recompute):
        found = gradients(change)
        assert max(gap(found[key], tensor) for key, tensor in wanted.items()) <= 1e-5


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Gemma 3", "Phi-3"])
def test_kernels_of_attention_agree(name):
    model = grown(from_pretrained_parts(plain_llm(name)))
    found = {}
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        found[kernel] = model(input_ids=words()).logits
        assert model.model.language_model.config._attn_implementation == kernel
    assert gap(found["sdpa"], found["eager"]) <= 1e-5


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "Phi-3"])
def test_plans_keep_the_librarys_and_name_only_what_is_there(name, shared):
    llm = plain_llm(name)
    model = grown(from_pretrained_parts(llm), shared, layers=[1])
    names = {each for each, _ in model.named_modules()} | {each for each, _ in model.named_parameters()}
    generic = {".".join("*" if piece.isdigit() else piece for piece in each.split(".")) for each in names}
    plan = {key.removeprefix("model.language_model.") for key in UniMoEForConditionalGeneration(model.config).tp_plan}
    assert {f"model.language_model.{key}" for key in plan if key.startswith("layers")} <= generic
    assert {key for key in llm.config.base_model_tp_plan if ".mlp." not in key} <= plan
    has_own = any(".experts" in key for key in plan)
    assert has_own == (not (shared and name == "Phi-3")), "a fused base that is shared is copied, not split"
    experts = model.config.text_config.base_model_ep_plan
    assert any(key.endswith("mlp.experts") for key in experts) == (not shared)
    assert {type(layer).__name__ for layer in model.model.language_model.layers} <= set(model._no_split_modules)


# Structure


class Feed(nn.Module):
    """A feed-forward network whose parts can be changed."""

    def __init__(self, **parts):
        super().__init__()
        linear = {name: nn.Linear(8, 12, bias=False) for name in ("gate_proj", "up_proj")}
        made = {**linear, "down_proj": nn.Linear(12, 8, bias=False), "act_fn": nn.SiLU(), **parts}
        for name, part in made.items():
            if part is not None:
                setattr(self, name, part)


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (None, "no feed-forward network called `mlp`"),
        (Feed(gate_proj=None), r"no gate \(`gate_proj`\)"),
        (Feed(down_proj=nn.Linear(12, 8)), r"biases \(`mlp.down_proj.bias`\)"),
        (Feed(norm=nn.LayerNorm(12, bias=False)), r"besides the three projections' \(`mlp.norm.weight`\)"),
        (Feed(experts=nn.ModuleList()), "mixtures of experts already"),
        (Feed(act_fn=None), "neither `act_fn` nor `activation_fn`"),
        (Feed(gate_up_proj=nn.Linear(8, 24, bias=False)), r"besides the three projections'"),
    ],
)
def test_a_feed_forward_network_is_read_or_refused(mlp, reason):
    with pytest.raises(ValueError, match=reason):
        read_feed_forward(mlp)


def test_activations_are_known_by_what_they_compute():
    kinds = ("silu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu", "relu", "gelu_10")
    found = [activation_name(LlamaMLP(LlamaConfig(hidden_act=kind, **small())).act_fn) for kind in kinds]
    assert found == ["silu", "gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu", None, None]
    torch.set_default_dtype(torch.bfloat16)  # as while a model is loaded
    try:
        assert activation_name(nn.GELU()) == "gelu"
    finally:
        torch.set_default_dtype(torch.float32)


def small() -> dict:
    return {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}


def test_logits_are_adjusted_by_the_fields_that_say_it():
    logits = torch.tensor([3.0, -4.0])
    for fields, expected in (
        ({}, logits),
        ({"logit_scale": 0.5}, logits * 0.5),
        ({"logits_scaling": 8.0}, logits / 8),
        ({"final_logit_softcapping": 2.0}, torch.tanh(logits / 2) * 2),
        ({"final_logit_softcapping": None, "logit_scale": None}, logits),
    ):
        assert torch.equal(adjust_logits(logits, LlamaConfig(**small(), **fields)), expected)


# Refusals


def llm_of(kind: str, **fields) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **fields})).eval()


MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
REFUSED = [
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}, "mixture of experts already.*such as a 'qwen3'"),
    ("mixtral", {"num_local_experts": 4}, "mixture of experts already"),
    ("gpt_oss", {"num_local_experts": 4}, "mixture of experts already"),
    ("deepseek_v3", {"n_routed_experts": 8, "first_k_dense_replace": 0, **MLA}, "mixture of experts already"),
    ("llama", {"mlp_bias": True}, "biases"),
    ("nemotron", {}, "no gate"),
    ("starcoder2", {}, "no gate"),
    ("arcee", {}, "no gate"),
    ("gpt2", {"n_embd": 32, "n_head": 2}, "no list of layers"),
    ("gpt_neox", {}, "no attention called `self_attn`"),
    ("lfm2", {}, "layers of type 'conv'|no feed-forward network"),
    ("qwen3_5_text", {}, "layers of type 'linear_attention'"),
    ("falcon_h1", {}, "layers of type 'hybrid'"),
    ("mamba", {}, "layers of type|no attention|no feed-forward"),
    ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}, "inputs of their own"),
]


@pytest.mark.parametrize(("kind", "fields", "reason"), REFUSED, ids=[kind for kind, _, _ in REFUSED])
def test_an_llm_that_cannot_be_the_decoder_is_refused_before_its_weights_are_read(kind, fields, reason, tmp_path):
    try:
        llm = llm_of(kind, **fields)
    except (ValueError, KeyError, TypeError) as error:
        pytest.skip(f"this release has no such model: {error}")
    for given in (llm, tmp_path):
        if given is tmp_path:
            llm.save_pretrained(tmp_path)
            for file in tmp_path.glob("*.safetensors"):
                file.write_bytes(b"no weights are to be read")
        with pytest.raises(ValueError, match=reason) as caught:
            from_pretrained_parts(str(given) if given is tmp_path else given)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


def test_what_the_config_alone_says_is_said_before_a_model_is_built(tmp_path):
    """Gemma 3n's towers need timm, which is not what it is refused for."""
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A 'gemma3n_text' LLM cannot be the decoder: its layers take inputs of"):
        from_pretrained_parts(str(tmp_path))


def test_an_encoder_with_a_decoder_is_no_llm():
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=99))
    with pytest.raises(ValueError, match="is a 't5' model, an encoder with a decoder; give an LLM"):
        from_pretrained_parts(t5)


@pytest.mark.parametrize("change", ["quantised", "classifier", "base"])
def test_a_folder_that_holds_no_plain_llm_is_refused_before_its_weights_are_read(change, tmp_path):
    config = LlamaConfig(**SMALL)
    config.architectures = {"classifier": ["LlamaForSequenceClassification"]}.get(change, ["LlamaForCausalLM"])
    if change == "quantised":
        config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights are to be read")
    reason = {"quantised": "is quantised", "classifier": "LlamaForSequenceClassification, which has no head"}
    with pytest.raises(ValueError, match=reason.get(change, "could not be loaded")):
        from_pretrained_parts(str(tmp_path))


def test_a_config_of_such_a_decoder_makes_no_model():
    for text, reason in (
        ({"model_type": "llama", "mlp_bias": True}, "biases"),
        ({"model_type": "starcoder2"}, "no gate"),
        ({"model_type": "bert"}, "no list of layers"),
    ):
        config = UniMoEConfig(text_config={**SMALL, **text})
        with pytest.raises(ValueError, match=f"A '{text['model_type']}' LLM cannot be the decoder: .*{reason}"):
            UniMoEForConditionalGeneration(config)
    with pytest.raises((ValueError, StrictDataclassError), match="knows no model of type 'gwen3'"):
        UniMoEConfig(text_config={"model_type": "gwen3"})


def test_an_llm_of_which_something_would_be_lost_is_refused():
    """Its parts have the known form, and its head does what no field says."""
    llm = plain_llm("Qwen3")

    class Shifted(nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    plain_forward = type(llm).forward

    class Odd(type(llm)):
        def forward(self, *args, **kwargs):
            outputs = plain_forward(self, *args, **kwargs)
            outputs.logits = outputs.logits + 0.5
            return outputs

    llm.__class__ = Odd
    with pytest.raises(ValueError, match="Words alone give other logits than the 'qwen3' LLM's"):
        from_pretrained_parts(llm)
    head = plain_llm("Qwen2.5")
    head.lm_head.__class__ = Shifted
    with pytest.raises(ValueError, match="head is no plain linear layer"):
        from_pretrained_parts(head)


def test_a_family_that_was_not_tested_is_taken_with_a_note(monkeypatch):
    monkeypatch.setattr(parts, "TESTED", frozenset())
    notes = []
    monkeypatch.setattr(parts.logger, "warning", notes.append)
    llm = plain_llm("OLMo 2")
    model = from_pretrained_parts(llm)
    assert torch.equal(model(input_ids=words()).logits, llm(input_ids=words()).logits)
    assert len(notes) == 1 and "'olmo2' were not tested" in notes[0]
    monkeypatch.undo()
    assert {kind for kind, _ in FAMILIES.values()} == parts.TESTED


def test_what_an_llm_generates_by_default_stays(tmp_path):
    """Stop tokens and sampling survive composing, growing and saving."""
    llm = plain_llm("Qwen3")
    llm.generation_config.update(eos_token_id=[2, 17], do_sample=True, top_k=7, temperature=0.6)
    model = grow_experts(from_pretrained_parts(llm), {"a": None, "b": None})
    model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    for each in (model, loaded):
        kept = each.generation_config
        assert (kept.eos_token_id, kept.top_k, kept.temperature, kept.do_sample) == ([2, 17], 7, 0.6, True)
    first = loaded.generate(words(1), max_new_tokens=1, do_sample=False)[0, -1].item()
    loaded.generation_config.eos_token_id = llm.generation_config.eos_token_id = [2, first]
    assert loaded.generate(words(1), max_new_tokens=9, do_sample=False).shape[1] == 21
    model.generation_config.eos_token_id = 5
    assert llm.generation_config.eos_token_id == [2, first], "the LLM's own is left alone"


def test_composing_leaves_the_llm_as_it_was():
    llm = plain_llm("Gemma 3").train()
    state, config = copy.deepcopy(llm.state_dict()), copy.deepcopy(llm.config.to_dict())
    model = grow_experts(from_pretrained_parts(llm), {"a": None, "b": None})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert llm.training and llm.config.to_dict() == config
    assert all(torch.equal(tensor, state[key]) for key, tensor in llm.state_dict().items())


def test_a_multimodal_models_own_llm_can_be_taken():
    """Of Gemma 3 with its own eyes the words alone: what stands around the LLM is left."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval()
    model = from_pretrained_parts(llm)
    assert model.config.text_config.model_type == "gemma3_text"
    assert torch.equal(model(input_ids=words()).logits, llm(input_ids=words()).logits)


def test_adapters_of_fused_and_of_split_weights_are_both_read(tmp_path):
    """An adapter of gate and up apart fits a fused LLM as well: both are the same function."""
    split, fused = from_pretrained_parts(plain_llm("Qwen3")), from_pretrained_parts(plain_llm("Phi-3"))
    for number, model in enumerate((split, fused)):
        mixture = grow_experts(model, {"a": None, "b": None}, lora_rank=4)
        with torch.no_grad():
            for experts in mixture._experts():
                experts.lora.gate_up_b.normal_(std=0.1)
        export_expert(mixture, tmp_path / str(number), "b")
    one, two = (read_expert("b", tmp_path / str(number), fused.config.text_config) for number in (0, 1))
    assert {key[:2] for key in one.factors} == {key[:2] for key in two.factors}
    assert (one.rank, two.rank) == (4, 8) and one.scaling == two.scaling
