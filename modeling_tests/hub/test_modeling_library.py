"""What the library does with any model: attention kernels, compiling, exporting, resizing, offloading, plans."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import composed, grown, plain_llm
from safetensors.torch import save_file
from tiny import (
    MIXED,
    MODALITIES,
    assert_logits_equal,
    labels_of,
    make_inputs,
    tiny_config,
    tiny_model,
)
from transformers import AutoModel

from uni_moe_hf import UniMoEForConditionalGeneration, UniMoEModel


ROWS = (MIXED, ("speech", 2, "image", 3))
both_bases = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


@pytest.fixture(autouse=True)
def seed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    # Compiled code of other runs may be half-written.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def valid(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Padding attends to nothing, and kernels differ in what they make of that."""
    return logits[inputs["attention_mask"].bool()]


# Attention


# Flex attention compiles its kernels.
@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["loaded", "set"])
def test_every_attention_kernel_gives_the_same_logits(model, attention, how, tmp_path):
    inputs = make_inputs(model.config, *ROWS)
    if how == "loaded":
        model.save_pretrained(tmp_path)
        other = UniMoEForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention).eval()
    else:
        other = copy.deepcopy(model)
        other.set_attn_implementation(attention)
    assert other.model.language_model.config._attn_implementation == attention
    assert other.model.vision_tower.config._attn_implementation == attention
    with torch.no_grad():  # flex attention has no backward pass on a CPU
        assert_logits_equal(valid(other(**inputs).logits, inputs), valid(model(**inputs).logits, inputs))


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "paged|sdpa"])
def test_beats_stays_with_torchs_kernel_where_its_bias_does_not_fit_another(model, attention):
    audio = copy.deepcopy(model.model.audio_tower)
    fbank = torch.randn(2, 32, audio.config.num_mel_bins)
    with torch.no_grad():
        expected = audio(fbank).last_hidden_state
        audio.config._attn_implementation = attention
        assert torch.equal(audio(fbank).last_hidden_state, expected)


def test_kernels_may_be_chosen_for_each_part(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation({"text_config": "eager", "audio_config": "eager"})
    assert other.model.language_model.config._attn_implementation == "eager"
    assert other.model.audio_tower.config._attn_implementation == "eager"
    assert other.model.vision_tower.config._attn_implementation == "sdpa"


# Experts


@pytest.mark.parametrize("route", ["eager", "auto", "segmented", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("how", ["str", "dict"])
def test_the_experts_route_may_be_named_when_loading_a_model_with_towers(model, route, how, tmp_path):
    model.save_pretrained(tmp_path)
    named = route if how == "str" else {"text_config": route}
    other = UniMoEForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=named).eval()
    assert other.get_experts_implementation() == {"": route}
    inputs = make_inputs(model.config, *ROWS)
    assert_logits_equal(valid(other(**inputs).logits, inputs), valid(model(**inputs).logits, inputs))


def test_the_experts_route_may_be_changed_as_the_library_does_it_around_generate():
    model = tiny_model()
    assert model.get_experts_implementation() == {"": "auto"}
    model.set_experts_implementation("grouped_mm")
    before = model.get_experts_implementation()
    model.set_experts_implementation(dict.fromkeys(before, "batched_mm"))
    assert {experts.experts_implementation for experts in model._experts()} == {"batched_mm"}
    model.set_experts_implementation(before)
    assert model.model.get_experts_implementation() == {"": "grouped_mm"}
    with pytest.raises(ValueError, match='There is no `experts_implementation="fast"`'):
        model.set_experts_implementation("fast")
    assert model.get_experts_implementation() == {"": "grouped_mm"}


# Initialisation


def test_what_a_checkpoint_lacks_is_initialised_by_the_parts_own_rules(tmp_path):
    """Whisper's positions are sines, CLIP's layers have a scale of their own: also where a file lacks them."""
    torch.manual_seed(5)
    model = UniMoEForConditionalGeneration(tiny_config())
    state = {name: t for name, t in model.state_dict().items() if "_tower." not in name}
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    positions = "model.speech_tower.embed_positions.weight"
    assert torch.equal(loaded.state_dict()[positions], model.state_dict()[positions])
    for name, tensor in model.state_dict().items():
        if "vision_tower" in name and tensor.dim() == 2 and tensor.numel() > 500:
            assert loaded.state_dict()[name].std() == pytest.approx(tensor.std().item(), rel=0.2), name


# Features and recorded outputs


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("part", ["whole", "headless"])
def test_features_come_in_the_librarys_outputs(model, modality, part):
    inputs = make_inputs(model.config, MIXED)
    names = {"image": ["pixel_values"], "video": ["pixel_values_videos"], "speech": ["input_features"]}
    media = {name: inputs[name] for name in names.get(modality, ["input_values", "input_values_mask"])}
    get = getattr(model if part == "whole" else model.model, f"get_{modality}_features")
    outputs = get(**media, output_hidden_states=True)
    assert outputs.pooler_output.shape[-1] == 32 and len(outputs.hidden_states) == 3
    assert outputs.last_hidden_state.shape == outputs.hidden_states[-1].shape
    as_tuple = get(**media, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.last_hidden_state)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = getattr(eager, f"get_{modality}_features")(**media, output_attentions=True).attentions
    assert len(attentions) == 2 and all(a.shape[1] == 4 and a.shape[2] == a.shape[3] for a in attentions)


@pytest.mark.parametrize("kind", ["generation", "headless", "text"])
def test_hidden_states_attentions_and_router_logits_come_from_every_class(kind):
    model = tiny_model({"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]})
    model.set_attn_implementation("eager")
    inputs = make_inputs(model.config, *(ROWS if kind != "text" else ((5,), (3,))))
    chosen = {"generation": model, "headless": model.model, "text": model.model.language_model}[kind]
    length = inputs["input_ids"].shape[1]
    outputs = chosen(**inputs, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, length, 32)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, length, length)] * 3
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(2 * length, 4)] * 2


# Compiling and exporting


@both_bases
@pytest.mark.slow
def test_compiled_forward_and_backward_equal_eager(shared):
    """All modalities, padding, labels: logits and gradients within 1e-5. What is not used has zeros for none."""
    torch._dynamo.reset()
    text = {"shared_expert_base": shared, "router_aux_loss_coef": 0.1, "output_router_logits": True}
    plain, compiled = tiny_model(text), torch.compile(tiny_model(text))
    inputs = make_inputs(plain.config, *ROWS)
    labels = labels_of(plain.config, inputs)
    outputs, expected = compiled(**inputs, labels=labels), plain(**inputs, labels=labels)
    assert_logits_equal(valid(outputs.logits, inputs), valid(expected.logits, inputs))
    outputs.loss.backward()
    expected.loss.backward()
    for (name, one), (_, other) in zip(compiled._orig_mod.named_parameters(), plain.named_parameters(), strict=True):
        used, expected = (torch.zeros_like(p) if p.grad is None else p.grad for p in (one, other))
        torch.testing.assert_close(used, expected, atol=1e-5, rtol=1e-4, msg=name)


@both_bases
def test_the_text_path_compiles_without_a_graph_break(shared):
    torch._dynamo.reset()
    model = tiny_model({"shared_expert_base": shared})
    inputs = make_inputs(model.config, (6,), (3,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = compiled(**inputs).logits
    assert_logits_equal(valid(logits, inputs), valid(model(**inputs).logits, inputs))


@both_bases
@pytest.mark.slow
def test_a_model_with_media_breaks_its_graph_for_two_reasons_only(shared):
    """The library installs what records the towers' outputs under a lock, once; then counts of clips are compared."""
    model = tiny_model({"shared_expert_base": shared})
    inputs = make_inputs(model.config, *ROWS)
    for expected in (
        "Unsupported context manager",
        "Unsupported Tensor.item() call with capture_scalar_outputs=False",
    ):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(**inputs)
        assert {str(reason.reason).splitlines()[0] for reason in explained.break_reasons} == {expected}
        model(**inputs)


@both_bases
@pytest.mark.parametrize("route", ["batched_mm", "grouped_mm"])
def test_the_text_path_exports_with_any_number_of_words(shared, route):
    model = tiny_model({"shared_expert_base": shared})
    model.set_experts_implementation(route)
    inputs = make_inputs(model.config, (6,), (6,))
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs={**inputs, "use_cache": False}, dynamic_shapes=shapes)
    for words in (6, 11):
        inputs = make_inputs(model.config, (words,), (words,), seed=words)
        assert_logits_equal(program.module()(**inputs, use_cache=False).logits, model(**inputs).logits)


@pytest.mark.slow
def test_a_compiled_step_of_decoding_answers_like_eager(model):
    torch._dynamo.reset()
    inputs = make_inputs(model.config, *ROWS)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**inputs, **settings)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward)
    assert torch.equal(compiled.generate(**inputs, **settings), expected)


# Dtypes, devices, vocabulary


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-4)], ids=str
)
def test_a_model_loads_and_answers_in_every_dtype(model, dtype, tolerance, tmp_path):
    """Three words of four, against float32: in bfloat16 a router may choose another expert for some."""
    model.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in other.named_parameters()}
    routers = {name: dtypes.pop(name) for name in list(dtypes) if ".mlp.gate." in name}
    assert set(dtypes.values()) == {dtype}
    assert set(routers.values()) == {torch.promote_types(dtype, torch.float32)}
    inputs = make_inputs(model.config, *ROWS)
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    for given in (inputs, cast):  # what the processor gives is float32, and is cast where it is used
        logits = other(**given).logits
        assert logits.dtype == dtype
        gaps = (valid(logits.float(), inputs) - valid(model(**inputs).logits, inputs)).abs().amax(dim=-1)
        assert gaps.quantile(0.75) < tolerance
    assert other.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_model_can_be_built_on_the_meta_device(model):
    with torch.device("meta"):
        empty = UniMoEForConditionalGeneration(copy.deepcopy(model.config))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


@pytest.mark.parametrize("cut", ["parts", "auto"])
def test_a_model_spread_over_memory_and_disk_answers_exactly(model, cut, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    device_map = {
        "model.vision_tower": "disk",
        "model.vision_connector": "cpu",
        "model.speech_tower": "cpu",
        "model.speech_connector": "disk",
        "model.audio_tower": "disk",
        "model.audio_connector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "disk",
        "model.language_model.layers.1": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    how = {"device_map": device_map} if cut == "parts" else {"device_map": "auto", "max_memory": {"cpu": "700KB"}}
    load = UniMoEForConditionalGeneration.from_pretrained
    spread = load(tmp_path / "model", offload_folder=tmp_path / "disk", **how)
    assert {"cpu", "disk"} == set(spread.hf_device_map.values())
    whole, inputs = load(tmp_path / "model"), make_inputs(model.config, *ROWS)
    assert torch.equal(spread(**inputs).logits, whole(**inputs).logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(spread.generate(**inputs, **settings), whole.generate(**inputs, **settings))


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_can_grow_past_the_placeholders_and_shrink(tied, tmp_path):
    """What is computed of old words stays; the config that is saved loads again."""
    model = tiny_model(tie_word_embeddings=tied)
    inputs = make_inputs(model.config, *ROWS)
    with torch.no_grad():
        before = model(**inputs).logits
    model.resize_token_embeddings(400, mean_resizing=False)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.text_config.vocab_size == 400 and model.config.image_token_id == 380
    assert_logits_equal(model(**inputs).logits[..., :380], before)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], 395)).loss
    loss.backward()
    assert model.lm_head.weight.grad[395].abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert_logits_equal(loaded(**inputs).logits, model(**inputs).logits)
    inputs["input_ids"] = torch.where(inputs["input_ids"] < 380, inputs["input_ids"] % 300, inputs["input_ids"])
    with torch.no_grad():
        before = loaded(**inputs).logits
    loaded.resize_token_embeddings(300)
    assert_logits_equal(loaded(**inputs).logits, before[..., :300])


def test_embeddings_and_parts_are_found_by_the_librarys_names(model):
    text = model.model.language_model
    assert model.get_input_embeddings() is text.embed_tokens and model.get_output_embeddings() is model.lm_head
    assert model.get_decoder() is text and model.base_model is model.model
    assert model.get_encoder(modality="image") is model.model.vision_tower
    assert model.get_encoder(modality="audio") is model.model.audio_tower
    other = copy.deepcopy(model)
    table = torch.nn.Embedding(380, 32)
    other.set_input_embeddings(table)
    assert other.model.language_model.embed_tokens is table


# Plans for several devices


@both_bases
@pytest.mark.parametrize("kinds", [["sparse", "sparse"], ["sparse", "dense"], ["dense", "dense"]], ids="-".join)
def test_every_entry_of_the_plans_names_something_and_every_layer_has_one(shared, kinds):
    model = tiny_model({"shared_expert_base": shared, "mlp_layer_types": kinds})
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    generic = {".".join("*" if piece.isdigit() else piece for piece in name.split(".")) for name in names}
    assert set(model.tp_plan) <= generic
    split = {name for name in model.tp_plan if ".mlp." in name}
    assert any(name.endswith(("experts.gate_up_proj", "base.gate_proj")) for name in split) == ("sparse" in kinds)
    assert any(name.endswith("mlp.gate_proj") for name in split) == ("dense" in kinds)
    assert model.fsdp_plan == {
        "lm_head": "keep_full_weight",
        "model.language_model.embed_tokens": "free_full_weight",
        "model.language_model.layers.*": "free_full_weight",
        "model.language_model.norm": "keep_full_weight",
    }  # frozen towers and small connectors are left whole
    assert "plan" not in str(model.config.to_dict())


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from uni_moe_hf import UniMoEForConditionalGeneration

folder = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
assert dist.get_world_size() == 2
model = UniMoEForConditionalGeneration.from_pretrained(
    folder + "/model", distributed_config=DistributedConfig(tp_size=2)
).eval()
split = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
assert any(".experts." in name and "lora" not in name for name in split), split
assert any(".experts.lora." in name for name in split) and any(".self_attn." in name for name in split), split
given = torch.load(folder + "/given.pt")
with torch.no_grad():
    gap = (model(**given["inputs"]).logits - given["logits"]).abs().max().item()
words = model.generate(**given["inputs"], max_new_tokens=5, do_sample=False)
assert torch.equal(words, given["words"])
if dist.get_rank() == 0:
    print("gap", gap, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shared"),
    [(None, False), (None, True), ("Qwen3", False), ("Qwen3", True), ("Gemma 2", True), ("Phi-3", False)],
)
def test_two_processes_with_split_layers_answer_like_one(name, shared, tmp_path):
    """Tensor parallelism over gloo: parameters are really split, logits within 1e-5, the same words."""
    model = tiny_model({"shared_expert_base": shared, "mlp_layer_types": ["sparse", "dense"]})
    if name is not None:
        model = grown(composed(plain_llm(name)), shared, layers=[0])
        model.generation_config.eos_token_id = None
    inputs = make_inputs(model.config, *ROWS)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        given = {"inputs": inputs, "logits": model(**inputs).logits}
    torch.save({**given, "words": model.generate(**inputs, max_new_tokens=5, do_sample=False)}, tmp_path / "given.pt")
    (tmp_path / "child.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **{name: str(value) for name, value in env.items()}}
        command = [sys.executable, str(tmp_path / "child.py"), str(tmp_path)]
        runs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    done = [run.communicate(timeout=240) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], done[0][1] + done[1][1]
    assert float(done[0][0].split("gap")[-1]) < 1e-5


# What is loaded from where


def test_every_class_loads_from_the_whole_models_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    headless = UniMoEModel.from_pretrained(tmp_path)
    assert torch.equal(headless.language_model.norm.weight, model.model.language_model.norm.weight)
    assert Path(tmp_path / "config.json").is_file()
