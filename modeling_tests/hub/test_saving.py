"""Models are saved and loaded, merged and initialised as designed."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    EXACT,
    MIXED,
    ROUNDING,
    TOWERS,
    assert_logits_equal,
    make_inputs,
    tiny_config,
    tiny_model,
)
from tiny_experts import both_bases
from transformers import AutoModel

from uni_moe_hf import UniMoEForConditionalGeneration, UniMoEModel


SUBSETS = [chosen for count in range(4) for chosen in itertools.combinations(TOWERS, count)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Saving and loading


def assert_states_equal(first, second):
    """Bit for bit. Results are not: where a file puts a tensor in memory decides which kernel multiplies it."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@both_bases
def test_saved_model_loads_equal_and_saves_again_to_identical_files(shared, tmp_path):
    model = tiny_model({"shared_expert_base": shared, "expert_names": ["a", "b", "c", "d"]}, video_pooling="none")
    model.save_pretrained(tmp_path / "first")
    loaded, info = AutoModel.from_pretrained(tmp_path / "first", output_loading_info=True)
    loaded.save_pretrained(tmp_path / "second")
    AutoModel.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_states_equal(loaded, model)
    inputs = make_inputs(model.config, MIXED)
    assert_logits_equal(loaded(**inputs).logits, model(**inputs).logits, 1e-5)
    first, second, third = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.is_file()}
        for folder in ("first", "second", "third")
    )
    assert second == third and {"config.json", "model.safetensors"} < second.keys()
    # A loaded config knows the dtype of its weights, a new one does not.
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == {"config.json"}
    lines = [[line for line in files["config.json"].splitlines() if b"dtype" not in line] for files in (first, second)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("without", SUBSETS[1:], ids="-".join)
def test_model_without_towers_saves_and_loads(without, tmp_path):
    model = tiny_model(without=without)
    model.save_pretrained(tmp_path)
    loaded, info = UniMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_states_equal(loaded, model)
    inputs = make_inputs(model.config, (*model.config.modalities, 3))
    assert_logits_equal(loaded(**inputs).logits, model(**inputs).logits, 1e-5)


def test_headless_model_loads_from_the_whole_one(own_model, tmp_path):
    own_model.save_pretrained(tmp_path)
    headless, info = UniMoEModel.from_pretrained(tmp_path, output_loading_info=True)
    inputs = make_inputs(own_model.config, MIXED)
    assert not info["missing_keys"]
    logits = own_model.lm_head(headless(**inputs).last_hidden_state)
    assert_logits_equal(logits, own_model(**inputs).logits)


def test_model_loads_in_bf16(own_model, tmp_path):
    """Logits within 0.2 of float32's, whose spread is above 0.3."""
    own_model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {".mlp.gate." in name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}  # routers stay exact
    inputs = make_inputs(own_model.config, MIXED)
    assert_logits_equal(loaded(**inputs).logits.float(), own_model(**inputs).logits, 0.2)


@pytest.mark.parametrize("where", ["text", "top"])
def test_tied_embeddings_stay_tied(tmp_path, where):
    text, fields = ({"tie_word_embeddings": True}, {}) if where == "text" else ({}, {"tie_word_embeddings": True})
    model = tiny_model(text, **fields)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = make_inputs(model.config, MIXED)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_untied_embeddings_are_two_tables(own_model):
    assert own_model.lm_head.weight is not own_model.get_input_embeddings().weight


# Merging


@both_bases
def test_merged_model_saves_as_a_mixture_of_plain_experts(shared, tmp_path):
    """The same logits within 1e-5 before merging, after it, and from the saved folder."""
    model = tiny_model({"shared_expert_base": shared})
    inputs = make_inputs(model.config, MIXED)
    expected = model(**inputs).logits
    model.merge_expert_lora()
    assert_logits_equal(model(**inputs).logits, expected)

    model.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["expert_lora_rank"], text["shared_expert_base"]) == (0, False)
    loaded, info = UniMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@both_bases
def test_unmerging_a_model_restores_weights_and_config(shared):
    """Bit by bit with a shared base, but for rounding with own bases."""
    model = tiny_model({"shared_expert_base": shared})
    config, weights = model.config.to_dict(), {name: w.clone() for name, w in model.state_dict().items()}
    model.merge_expert_lora()
    model.unmerge_expert_lora()
    assert model.config.to_dict() == config and model.state_dict().keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(model.state_dict()[name], weight, **(EXACT if shared else ROUNDING))


@both_bases
def test_model_is_merged_once_and_unmerged_once(shared):
    model = tiny_model({"shared_expert_base": shared})
    with pytest.raises(ValueError, match="not merged"):
        model.unmerge_expert_lora()
    model.merge_expert_lora()
    with pytest.raises(ValueError, match="expert_lora_rank=0"):
        model.merge_expert_lora()
    model.unmerge_expert_lora()
    with pytest.raises(ValueError, match="not merged"):
        model.unmerge_expert_lora()


def test_dense_model_has_nothing_to_merge():
    model = tiny_model({"mlp_layer_types": ["dense", "dense"]}, without=TOWERS)
    with pytest.raises(ValueError, match="0 sparse layers"):
        model.merge_expert_lora()


def test_loaded_merged_model_cannot_be_unmerged(own_model, tmp_path):
    merged = tiny_model()
    merged.merge_expert_lora()
    merged.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not merged in this process"):
        UniMoEForConditionalGeneration.from_pretrained(tmp_path).unmerge_expert_lora()


# Initialisation


@pytest.fixture
def uninitialised_memory_is_nan():
    """`torch.empty` gives NaN, so that nothing passes for initialised by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def spread(tensor: torch.Tensor) -> float:
    return tensor.detach().std().item()


def assert_initialised_as_designed(model: UniMoEForConditionalGeneration) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        assert tensor.isfinite().all(), name
    text = model.config.text_config
    for layer in model.model.language_model.layers:
        lora = layer.mlp.experts.lora
        assert (lora.gate_up_b == 0).all() and (lora.down_b == 0).all()
        for factor, width in ((lora.gate_up_a, text.hidden_size), (lora.down_a, text.intermediate_size)):
            assert 0.9 * width**-0.5 < factor.abs().max() <= width**-0.5
        assert spread(layer.mlp.gate.weight) == pytest.approx(text.initializer_range, rel=0.3)
    for layer in model.model.audio_tower.encoder.layers:
        assert (layer.self_attn.grep_a == 1).all()
    for connector in (model.model.speech_connector, model.model.audio_connector):
        queries = connector.query_tokens[0]
        assert spread(queries) == pytest.approx(model.config.initializer_range, rel=0.3)
        assert len(queries.unique(dim=0)) == len(queries)


@both_bases
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_new_model_is_initialised_as_designed(shared):
    assert torch.empty(3).isnan().all()
    assert_initialised_as_designed(UniMoEForConditionalGeneration(tiny_config({"shared_expert_base": shared})))


@both_bases
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_missing_weights_are_initialised_as_designed(shared, tmp_path):
    """All decoder layers, connectors and BEATs are missing; what is there is taken as it is."""
    saved = tiny_model({"shared_expert_base": shared})
    saved.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    parts = ("language_model.layers.", "connector.", "audio_tower.")
    dropped = {name for name in weights if any(part in name for part in parts)}
    save_file({name: w for name, w in weights.items() if name not in dropped}, path, metadata={"format": "pt"})

    loaded, info = UniMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == dropped
    assert_initialised_as_designed(loaded)
    kept = weights.keys() - dropped
    assert kept and all(torch.equal(loaded.state_dict()[name], weights[name]) for name in kept)

    fresh = UniMoEForConditionalGeneration(tiny_config({"shared_expert_base": shared}))
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(fresh.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in fresh.named_buffers())
    spreads = {name: spread(tensor) for name, tensor in fresh.named_parameters() if tensor.numel() > 200}
    for name in spreads.keys() & dropped:
        assert spread(loaded.get_parameter(name)) == pytest.approx(spreads[name], rel=0.3, abs=1e-6), name


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_model_loads_from_a_file_without_its_queries(tmp_path):
    """As a checkpoint of the language model and its towers is: only `query_tokens` and LoRA are new."""
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {n: w for n, w in load_file(path).items() if "query_tokens" not in n and ".lora." not in n}
    save_file(weights, path, metadata={"format": "pt"})
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert parameter.isfinite().all(), name
        if name in weights:
            assert torch.equal(parameter, weights[name]), name
    for connector in (loaded.model.speech_connector, loaded.model.audio_connector):
        assert len(connector.query_tokens[0].unique(dim=0)) == connector.query_tokens.shape[1]
