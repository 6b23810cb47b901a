"""Weights are all there or nothing is loaded; what a part is, is known before its weights are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_parts import parts
from transformers import (
    ASTConfig,
    ASTModel,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    MoonshineConfig,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    WhisperForConditionalGeneration,
)

from uni_moe_hf import from_pretrained_parts
from uni_moe_hf.mixtures.loading import load_whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def changed(folder, tmp_path, change):
    """The checkpoint with other tensors or another config."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


CONNECTOR = "model.vision_connector.projector.0.weight"


def test_a_whole_checkpoint_is_loaded(folder):
    assert torch.equal(load_whole(AutoModel, folder).state_dict()[CONNECTOR], tiny_model().state_dict()[CONNECTOR])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c, t: t.pop(CONNECTOR), f"1 tensors are missing from its weights, such as '{CONNECTOR}'"),
        (lambda c, t: t.update({"model.more": torch.ones(2)}), "1 tensors are in its weights and in no place"),
        (
            lambda c, t: t.update({CONNECTOR: torch.ones(2, 2)}),
            rf"holds '{CONNECTOR}' of shape \(2, 2\), but its config",
        ),
        (
            lambda c, t: c["text_config"].update(num_experts=10**9),
            "`num_experts=1000000000` must be .*4096",
        ),
        (lambda c, t: c["text_config"].update(num_experts=4000), r"of shape \(\d+, \d+, \d+\), but its config"),
        (lambda c, t: c["text_config"].update(num_hidden_layers=10**6), "`num_hidden_layers=1000000`"),
        (lambda c, t: c["text_config"].update(hidden_size=-8), "`hidden_size=-8`"),
        (lambda c, t: c["text_config"].update(hidden_size=2**20), "but its config.json describes"),
        (lambda c, t: c["vision_config"].update(num_hidden_layers=10**7), "`num_hidden_layers=10000000`"),
        (lambda c, t: c["vision_config"].update(patch_size=0), "`patch_size=0`"),
        (lambda c, t: c["speech_config"].update(encoder_layers=10**8), "=100000000` of a 'whisper'"),
        (lambda c, t: c["audio_config"].update(num_attention_heads=0), "`num_attention_heads=0`"),
        (lambda c, t: c["text_config"].update(hidden_act="magic"), "could not be loaded|no model that is known"),
        (lambda c, t: c["text_config"].update(num_attention_heads=7), "could not be loaded|no model that is known"),
        (lambda c, t: c.update(text_config=5), "could not be loaded|no model that is known"),
        (lambda c, t: c.update(vision_config={"model_type": "nothing"}), "could not be loaded|no model that is known"),
    ],
)
def test_what_does_not_belong_together_is_one_sentence(folder, tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        load_whole(AutoModel, changed(folder, tmp_path / "x", change))
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_and_missing_folders_are_one_sentence(folder, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "cut/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_whole(AutoModel, tmp_path / "cut")
    (tmp_path / "cut/config.json").write_text("{")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_whole(AutoModel, tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(ValueError, match="holds no model|There is no checkpoint"):
            load_whole(AutoModel, tmp_path / name)


# ---- parts ----

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def saved(model, path):
    model.save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"no weights are to be read")
    return str(path)


def test_a_tower_of_another_kind_is_refused_before_its_weights_are_read(tmp_path):
    given = parts()
    llm = given["language_model"]
    for argument, model, reason in (
        ("audio_tower", llm, "'llama' model is no encoder of sound that is known here; use one of beats"),
        ("audio_tower", given["vision_tower"], "'clip_vision_model' model is no encoder of sound"),
        (
            "vision_tower",
            ASTModel(ASTConfig(**SMALL)),
            "transformer' model, but a backbone for square",
        ),
        ("vision_tower", llm, "'llama' model, but a backbone for square pictures"),
        ("speech_tower", llm, "'llama' model is no encoder of speech that is known here; use one of whisper"),
    ):
        with pytest.raises(ValueError, match=reason):
            from_pretrained_parts(llm, **{argument: saved(model, tmp_path / f"{argument}{reason[:9]}")})
        with pytest.raises(ValueError, match=reason):
            from_pretrained_parts(llm, **{argument: model})
    for config in (MoonshineConfig(), Wav2Vec2Config()):
        config.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(ValueError, match=f"'{config.model_type}' model is no encoder of speech"):
            from_pretrained_parts(llm, speech_tower=str(tmp_path / config.model_type))


def test_weights_of_a_part_that_are_missing_are_named(tmp_path):
    given = parts()
    for name in ("language_model", "vision_tower", "speech_tower", "audio_tower"):
        given[name].save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        lost = sorted(key for key in tensors if "layers.0" in key)[0]
        del tensors[lost]
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        arguments = {"language_model": given["language_model"], name: str(tmp_path / name)}
        arguments["num_speech_query_tokens"] = 3
        with pytest.raises(ValueError, match=f"'{tmp_path / name}' does not hold the model .* missing .*layers.0"):
            from_pretrained_parts(**arguments)


def test_a_part_may_be_half_of_a_larger_model_and_lack_a_head(tmp_path):
    """A CLIP with its text half, a ViT for classification (without the pooler), a Whisper with its output layer."""
    given = parts()
    clip = CLIPModel(CLIPConfig(text_config={**SMALL, "vocab_size": 99}, vision_config=VISION, projection_dim=16))
    vit = ViTForImageClassification(ViTConfig(**VISION))
    whisper = WhisperForConditionalGeneration(given["speech_tower"].config)
    for name, model in (("clip", clip), ("vit", vit), ("whisper", whisper)):
        model.save_pretrained(tmp_path / name)
        argument = "speech_tower" if name == "whisper" else "vision_tower"
        tower = {argument: str(tmp_path / name)}
        made = from_pretrained_parts(given["language_model"], **tower, num_speech_query_tokens=3)
        tower = getattr(made.model, argument)
        own = {"clip": "vision_model", "vit": "vit", "whisper": "model"}[name]
        part = getattr(model, own)
        part = part.encoder if name == "whisper" else part
        assert all(torch.equal(tower.state_dict()[key], value) for key, value in part.state_dict().items())
