"""What is odd about a part is said in one sentence, and before weights are read where they are not needed for it."""

import copy
import json
import re

import pytest
import torch
from families import SMALL, gap, plain_llm, words
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import DENSE, tiny_config, tiny_model, tiny_tokenizer
from tiny_parts import parts
from tiny_towers import EARS, FLAT, STAGED, WHISPER, ear, vision_tower
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperForCausalLM,
    WhisperModel,
)

from uni_moe_hf import build_processor, from_pretrained_parts
from uni_moe_hf.cli.main import main
from uni_moe_hf.mixtures.loading import load_whole


QUERIES = {"num_speech_query_tokens": 3, "num_audio_query_tokens": 5}
QFORMER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def compose(**changes):
    return from_pretrained_parts(**{"language_model": parts()["language_model"], **QUERIES, **changes})


def refusal(**changes) -> str:
    """The one sentence with which parts are refused."""
    with pytest.raises(ValueError) as caught:
        compose(**changes)
    sentence = str(caught.value)
    assert type(caught.value) is ValueError and len(sentence.splitlines()) == 1 and len(sentence) < 400, sentence
    return sentence


# States of a part


def broken(model: torch.nn.Module, value: float) -> torch.nn.Module:
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    for name, given in parts().items():
        if name != "audio_connector_config":
            assert "NaN or infinite values" in refusal(**{name: broken(given, value)})
    broken(vision_tower("dinov2"), value).save_pretrained(tmp_path)
    assert "NaN or infinite values" in refusal(vision_tower=str(tmp_path))


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"], ["q_proj"]])
def test_a_part_with_an_adapter_is_refused(targets, tmp_path):
    llm = get_peft_model(plain_llm("Qwen3"), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    assert "`language_model` is a 'qwen3' model, and carries an adapter; merge" in refusal(language_model=llm)
    assert "carries an adapter" in refusal(language_model=llm.base_model.model)
    tower = get_peft_model(vision_tower("clip_vision_model"), LoraConfig(target_modules=["q_proj"]))
    assert "carries an adapter" in refusal(vision_tower=tower)
    llm.save_pretrained(tmp_path)
    plain_llm("Qwen3").save_pretrained(tmp_path)
    assert "holds an adapter beside it" in refusal(language_model=str(tmp_path))
    merged = llm.merge_and_unload()
    assert torch.equal(compose(language_model=merged)(input_ids=words()).logits, merged(input_ids=words()).logits)


def test_an_empty_or_cut_or_composed_part_is_refused():
    with torch.device("meta"):
        empty, tower = plain_llm_on_meta(), AutoModel.from_config(AutoConfig.for_model("vit", **FLAT))
    assert "offloaded or empty" in refusal(language_model=empty)
    assert "offloaded or empty" in refusal(vision_tower=tower)
    cut = plain_llm("Qwen3")
    cut.model.layers = cut.model.layers[:1]
    assert "with 1 layers, but its config has `num_hidden_layers=2`" in refusal(language_model=cut)
    whole = tiny_model(DENSE)
    for name in ("language_model", "vision_tower", "speech_tower", "audio_tower"):
        assert f"`{name}` is a Uni-MoE already" in refusal(**{name: whole})
    assert "`language_model` is missing" in refusal(language_model=None)


def plain_llm_on_meta() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL))


# Larger models


def test_a_tower_is_found_in_a_larger_model(tmp_path):
    """With a classifier's head, or as the eyes of another multimodal model: whole and from its folder."""
    torch.manual_seed(0)
    classifiers = [("vit", FLAT), ("dinov2", FLAT), ("convnext", STAGED)]
    for kind, settings in classifiers:
        given = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **settings)).eval()
        assert_has_tower(compose(vision_tower=given), given.base_model)
    vision = CLIPVisionConfig(**FLAT)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL), image_token_index=5)
    )
    llava.save_pretrained(tmp_path)
    for given in (llava, str(tmp_path)):
        assert_has_tower(compose(vision_tower=given), llava.model.vision_tower)


def assert_has_tower(model, tower) -> None:
    state = tower.state_dict()
    found = model.model.vision_tower.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert all("pooler" in key for key in found.keys() - state.keys())


def test_a_whisper_without_an_encoder_is_no_ear():
    config = copy.deepcopy(WHISPER)
    for name, given in (("speech_tower", WhisperModel(config).decoder), ("audio_tower", WhisperForCausalLM(config))):
        assert "without an encoder" in refusal(**{name: given})
    odd = WhisperConfig(**{**config.to_dict(), "max_source_positions": 75})
    for name in ("speech_tower", "audio_tower"):
        assert "max_source_positions=75" in refusal(**{name: WhisperModel(odd)})


# What a config says


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "nope"}, "which cannot be built"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1.0}}, "which cannot be built|no model that is known"),
        ({"pad_token_id": SMALL["vocab_size"]}, "which cannot be built"),
        ({"head_dim": 0}, "`head_dim=0`"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads=0`"),
        ({"vocab_size": 0}, "`vocab_size=0`"),
        ({"num_hidden_layers": 20000, "layer_types": None}, "`num_hidden_layers=20000`"),
        (
            {"intermediate_size": 72},
            "have another shape in its weights than in the model, such as 'model.layers.0.mlp",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_llms_config_that_describes_no_model_is_one_sentence(change, reason, tmp_path):
    plain_llm("Qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert re.search(reason, refusal(language_model=str(tmp_path)))


@pytest.mark.parametrize("leftover", [{"num_experts": 0}, {"num_experts": 1}, {"num_experts_per_tok": 8}])
def test_what_a_dense_llms_config_says_of_experts_does_not_count(leftover):
    llm = plain_llm("Qwen2.5")
    for name, value in leftover.items():
        setattr(llm.config, name, value)
    model = compose(language_model=llm)
    assert gap(model(input_ids=words()).logits, llm(input_ids=words()).logits) == 0
    assert model.config.text_config.num_experts == 4 and "dense" in model.config.text_config.mlp_layer_types


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video_pooling": "foo"}, "video_pooling"),
        ({"num_audio_query_tokens": 0}, "`num_audio_query_tokens=0`"),
        ({"num_speech_query_tokens": 50}, "max_target_positions=16"),
        ({"vision_feature_layer": 0}, "`vision_feature_layer=0` is no layer of a 'clip_vision_model' model of 2"),
        ({"vision_feature_layer": 9}, "`vision_feature_layer=9` is no layer"),
        ({"vision_feature_layer": "x"}, "`vision_feature_layer='x'` is no layer"),
        ({"vision_feature_layer": [1]}, "is no layer"),
        ({"vision_prefix_length": -1}, "has 1 tokens before the patches; leave it out"),
        ({"text_config": {}}, "knows no `text_config`"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused_before_weights_are_read(fields, reason, tmp_path):
    given = parts()
    folders = {}
    for name in ("vision_tower", "speech_tower", "audio_tower"):
        given[name].save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"no weights are to be read")
        folders[name] = str(tmp_path / name)
    assert reason in refusal(**folders, **fields)


def test_layers_counted_from_either_end_are_the_same(tmp_path):
    for kind in ("clip_vision_model", "dinov3_convnext"):
        tower = vision_tower(kind)
        last = compose(vision_tower=tower, vision_feature_layer=-1)
        side = tower.config.image_size
        pixels = torch.randn(1, 3, side, side)
        with torch.no_grad():
            seen = last.model.get_image_features(pixels).pooler_output
        assert seen.isfinite().all()
    config = tiny_config()
    for layer in (0, 3, -3):
        with pytest.raises(Exception, match=f"vision_feature_layer={layer}`? is none of the vision tower's 2 layers"):
            tiny_config(vision_feature_layer=layer)
    with pytest.raises(Exception, match="must not be negative"):
        tiny_config(vision_prefix_length=-1)
    assert config.vision_prefix_length == 1


# Folders whose weights are of another model than the config says


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["text_config"].update(model_type="llama"),
        lambda config: config["text_config"].pop("model_type"),
        lambda config: config.update(vision_config=None),
        lambda config: config.update(speech_config=None),
    ],
)
def test_weights_that_no_part_of_the_config_has_are_refused_by_every_tool(change, tmp_path, capsys):
    model = compose(language_model=plain_llm("Qwen3"), **{k: v for k, v in parts().items() if k != "language_model"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in its weights and in no place of the model"):
        load_whole(AutoModel, tmp_path)
    assert main(["info", str(tmp_path)]) == 1
    assert "in no place of the model" in capsys.readouterr().err


# Arguments of the processor that have nothing to act on


def test_what_a_processor_has_no_use_for_is_refused(tmp_path):
    deaf = compose()
    _, extractor = ear("AST")
    beats = compose(audio_tower=parts()["audio_tower"], audio_connector_config=QFORMER)
    extractor.save_pretrained(tmp_path)
    for model, settings, reason in (
        (deaf, {"audio_feature_extractor": "/no/such/x"}, "the encoder of sound is missing; leave it out"),
        (beats, {"audio_feature_extractor": extractor}, "'beats' model, which has its own; leave it out"),
        (beats, {"audio_feature_extractor": str(tmp_path)}, "which has its own"),
        (deaf, {"image_size": 64}, "the model has no vision tower; leave it out"),
    ):
        with pytest.raises(ValueError, match=reason):
            build_processor(model.config, tiny_tokenizer(), **settings)
    for length in (0, -1, 1.5, "x"):
        with pytest.raises(ValueError, match="must be a whole number of seconds"):
            type(EARS["YAMNet"][1])(chunk_length=length)


def test_tensors_of_another_shape_are_named(tmp_path):
    vision_tower("vit").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("weight"))
    tensors[name] = tensors[name].new_zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "have another shape in its weights" in refusal(vision_tower=str(tmp_path))
