"""Building models and processors from parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import DENSE, ROUNDING, film, picture, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, tone
from tiny_parts import parts, save_dino
from tiny_towers import EARS, FLAT, SMALL, VISION, ear, vision_tower
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
)

from uni_moe_hf import UniMoEForConditionalGeneration
from uni_moe_hf.hub.configuration_uni_moe import is_sparse
from uni_moe_hf.mixtures.composition import from_pretrained_parts
from uni_moe_hf.mixtures.loading import load_whole
from uni_moe_hf.mixtures.processors import build_processor


def text_ids() -> torch.Tensor:
    return torch.arange(2, 42).reshape(2, 20)


def test_a_composed_model_computes_what_its_parts_compute():
    given = parts()
    model = from_pretrained_parts(**given, num_speech_query_tokens=3, num_audio_query_tokens=5).eval()
    assert not is_sparse(model.config.text_config)
    ids = text_ids()
    torch.testing.assert_close(model(input_ids=ids).logits, given["language_model"](input_ids=ids).logits, **ROUNDING)
    pixels, mel, fbank = torch.randn(1, 3, 16, 16), torch.randn(1, 80, 100), torch.randn(1, 98, 128)
    inner = model.model
    for mine, theirs in (
        (inner.vision_tower(pixels), given["vision_tower"](pixels)),
        (inner.speech_tower(mel), given["speech_tower"].encoder(mel)),
        (inner.audio_tower(fbank), given["audio_tower"](fbank)),
    ):
        torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_llm_keeps_its_positions(dtype):
    """Logits of the Llama itself, at positions whose angles rounding would move by a tenth of a turn."""
    llm = parts()["language_model"].to(dtype)
    frequencies = LlamaForCausalLM(llm.config).model.rotary_emb.inv_freq
    llm.model.rotary_emb.inv_freq.data = frequencies.clone()  # as from a file: `to` has just rounded them
    model = from_pretrained_parts(llm, vision_tower=parts()["vision_tower"])
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, frequencies)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids, positions = text_ids(), 1000 + torch.arange(20).expand(2, -1)
    found, expected = (each(input_ids=ids, position_ids=positions).logits for each in (model, llm))
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_the_speech_connector_starts_as_whispers_decoder():
    given = parts()
    connector = from_pretrained_parts(**given, num_speech_query_tokens=3).model.speech_connector
    for name, tensor in connector.decoder.state_dict().items():
        assert torch.equal(tensor, given["speech_tower"].decoder.state_dict()[name]), name


def test_parts_are_loaded_from_folders(tmp_path):
    given = parts()
    folders = {}
    for name, part in given.items():
        if name != "audio_connector_config":
            part.save_pretrained(tmp_path / name)
            folders[name] = str(tmp_path / name)
    settings = {"audio_connector_config": given["audio_connector_config"], "num_speech_query_tokens": 3}
    model = from_pretrained_parts(**folders, **settings).eval()
    reference = given["language_model"](input_ids=text_ids()).logits
    torch.testing.assert_close(model(input_ids=text_ids()).logits, reference, **ROUNDING)


def test_a_speech_tower_that_is_no_whisper_is_refused():
    given = parts()
    with pytest.raises(ValueError, match="'clip_vision_model' model is no encoder of speech .*whisper"):
        from_pretrained_parts(given["language_model"], speech_tower=given["vision_tower"])


def test_placeholders_stand_behind_a_padded_embedding_table():
    tokenizer = tiny_tokenizer()
    config = tiny_config({"vocab_size": len(tokenizer) + 13})
    processor = build_processor(config, tokenizer)
    assert config.image_token_id == processor.image_token_id == config.text_config.vocab_size
    assert config.speech_token_id == config.text_config.vocab_size + 3


def test_windows_of_part_seconds_are_refused():
    config = tiny_config()
    config.speech_config.max_source_positions = 75
    with pytest.raises(ValueError, match="75.*multiple of 50"):
        tiny_processor(config)


def test_the_processor_of_a_composed_model_feeds_it():
    config = tiny_config(DENSE)
    processor = tiny_processor(config)
    inputs = processor(text="<audio> what <speech>", audio=tone(), speech=tone(2.5), return_tensors="pt")
    assert tiny_model(DENSE)(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.mark.parametrize(("image_size", "tokens"), [(None, 25), (24, 9), (68, 64)])
def test_a_tower_brings_its_own_image_processor_and_pictures_may_have_another_size(dino, image_size, tokens, tmp_path):
    model = from_pretrained_parts(parts()["language_model"], vision_tower=dino).eval()
    assert model.config.image_seq_length == 49
    processor = build_processor(model.config, tiny_tokenizer(), image_processor=dino, image_size=image_size)
    assert model.config.image_seq_length == processor.image_seq_length == tokens
    assert list(processor.image_processor.image_mean) == [0.4] * 3
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    for each in (processor, loaded):
        inputs = each(text="<image> what <video>", images=picture(), videos=film(), return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
        assert model(**inputs).logits.isfinite().all()
    side = image_size or 40
    plain = BitImageProcessorPil.from_pretrained(
        dino, size={"shortest_edge": image_size or 48}, crop_size={"height": side, "width": side}
    )
    expected = plain(picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], expected, **ROUNDING)


def registers(**sizes) -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **sizes))


def siglip(**sizes) -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(intermediate_size=64, **sizes))


@pytest.mark.parametrize(("kind", "prefix"), [(registers, 4), (siglip, 0)])
def test_a_tower_is_asked_what_stands_before_its_patches(kind, prefix):
    """Registers are no patches, and a tower without CLS token loses none."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 8}
    model = from_pretrained_parts(parts()["language_model"], vision_tower=kind(**sizes)).eval()
    assert (model.config.image_seq_length, model.config.vision_prefix_length) == (49, prefix)
    given = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = build_processor(model.config, tiny_tokenizer(), image_processor=given)
    inputs = processor(text="<image> what", images=picture(), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 49
    assert model(**inputs).logits.isfinite().all()


def test_a_processor_may_be_made_again_for_another_size(dino):
    model = from_pretrained_parts(parts()["language_model"], vision_tower=dino)
    sizes = [
        build_processor(model.config, tiny_tokenizer(), dino, image_size=side).image_seq_length for side in (32, 16)
    ]
    assert sizes == [16, 4] and model.config.image_seq_length == 4
    with pytest.raises(ValueError, match="`image_size='28'` must be a number of pixels"):
        build_processor(model.config, tiny_tokenizer(), dino, image_size="28")


def test_pictures_without_a_crop_take_another_size_as_well(dino):
    config = from_pretrained_parts(parts()["language_model"], vision_tower=dino).config
    patch, square = config.vision_config.patch_size, {"height": 99, "width": 99}
    given = ViTImageProcessorPil(size=square)
    processor = build_processor(config, tiny_tokenizer(), image_processor=given, image_size=3 * patch)
    assert processor(images=picture(), return_tensors="pt")["pixel_values"].shape[-2:] == (3 * patch, 3 * patch)
    assert (config.image_seq_length, given.size.height) == (9, 99)


def test_a_number_of_tokens_given_by_hand_stays():
    config = tiny_config(DENSE, image_seq_length=99)
    assert build_processor(config, tiny_tokenizer()).image_seq_length == config.image_seq_length == 99


def test_pictures_of_no_fixed_size_are_refused(dino):
    model = from_pretrained_parts(parts()["language_model"], vision_tower=dino)
    given = BitImageProcessorPil(size={"shortest_edge": 48}, do_center_crop=False)
    with pytest.raises(ValueError, match="BitImageProcessorPil makes pictures of .* must be squares of one size"):
        build_processor(model.config, tiny_tokenizer(), image_processor=given)
    assert model.config.image_seq_length == 49


# Towers of every kind


@pytest.mark.parametrize("kind", VISION)
@torch.no_grad()
def test_a_vision_tower_of_any_kind_sees_through_its_connector(kind, tmp_path):
    """Whole and from a folder, saved and loaded; what is read are the patches of the layer that the config names."""
    tower, (_, tokens, prefix) = vision_tower(kind), VISION[kind]
    llm = parts()["language_model"]
    model = from_pretrained_parts(llm, vision_tower=tower).eval()
    config = model.config
    assert (config.image_seq_length, config.vision_prefix_length) == (tokens, prefix)
    side = tower.config.image_size if isinstance(tower.config.image_size, int) else tower.config.image_size[0]
    given = ViTImageProcessorPil(size={"height": side, "width": side})
    processor = build_processor(config, tiny_tokenizer(), image_processor=given)
    inputs = processor(text="<image> what", images=picture(), return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_id).sum() == tokens
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[config.vision_feature_layer]
    patches = states.flatten(2).transpose(1, 2) if states.dim() == 4 else states[:, prefix:]
    seen = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(seen, model.model.vision_connector(patches), **ROUNDING)
    expected = model(**inputs).logits
    tower.save_pretrained(tmp_path / "tower")
    other = from_pretrained_parts(llm, vision_tower=str(tmp_path / "tower"))
    state = model.model.vision_tower.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.model.vision_tower.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    # By the library, and by the tools, which look at the file's names first: some kinds are saved under others.
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(**inputs).logits, expected, **ROUNDING)
    checked = load_whole(AutoModel, tmp_path / "model").model.vision_tower.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in checked.items())
    tensors = load_file(tmp_path / "model/model.safetensors")
    del tensors[next(key for key in tensors if "_tower" in key)]
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing|tensors are missing from its weights"):
        load_whole(AutoModel, tmp_path / "model")


def test_what_stands_before_the_patches_does_not_look_at_one_of_them():
    """Of the embeddings, each patch token changes with its own pixels and with no others."""
    for kind, (settings, _, prefix) in VISION.items():
        if "patch_size" not in settings or "window_size" in settings:
            continue
        tower = vision_tower(kind)
        pixels = torch.randn(1, 3, 32, 32)
        first, last = pixels.clone(), pixels.clone()
        first[..., :8, :8] += 1
        last[..., -8:, -8:] += 1
        with torch.no_grad():
            embeddings = [tower(each, output_hidden_states=True).hidden_states[0][0] for each in (pixels, first, last)]
        moved = [(each != embeddings[0]).any(dim=-1).nonzero().flatten().tolist() for each in embeddings[1:]]
        assert moved == [[prefix], [prefix + 15]], kind


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("siglip2_vision_model", {**FLAT, "num_patches": 16}, "gives no tokens of a picture of 32 pixels"),
        ("vit_mae", FLAT, "makes .* tokens of a picture of 32 pixels and .* so which are patches is unknown"),
        ("resnet", {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}, "a backbone for square pictures"),
    ],
)
def test_a_vision_tower_that_cannot_be_read_is_refused(kind, settings, reason):
    tower = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with pytest.raises(ValueError, match=f"`vision_tower` is a '{kind}' model.*{reason}") as caught:
        from_pretrained_parts(parts()["language_model"], vision_tower=tower)
    assert len(str(caught.value)) < 350


def test_pictures_that_do_not_fit_the_tower_are_refused_when_the_processor_is_made():
    model = from_pretrained_parts(parts()["language_model"], vision_tower=vision_tower("siglip_vision_model"))
    given = ViTImageProcessorPil(size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match="'siglip_vision_model' model, which gives no tokens of a picture of 48"):
        build_processor(model.config, tiny_tokenizer(), image_processor=given)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"image_processor_type": "DINOv3ViTImageProcessorFast"}, "ViTImageProcessorPil"),
        ({"image_processor_type": "SiglipImageProcessorFast"}, "SiglipImageProcessorPil"),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True}, "CLIPImageProcessorPil"),
        ({"image_processor_type": "SomeOtherImageProcessor", "do_center_crop": True}, "CLIPImageProcessorPil"),
        ({"image_processor_type": "BitImageProcessor"}, "BitImageProcessorPil"),
    ],
)
def test_image_processors_run_on_pillow_alone(settings, steps, tmp_path):
    square = {"height": 32, "width": 32}
    common = {"size": square, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, "do_resize": True, "resample": 2}
    common |= {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    if settings.get("do_center_crop") or "Bit" in str(settings):
        common |= {"size": {"shortest_edge": 32}, "crop_size": square}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**common, **settings}))
    model = from_pretrained_parts(parts()["language_model"], vision_tower=vision_tower("dinov3_vit"))
    processor = build_processor(model.config, tiny_tokenizer(), image_processor=str(tmp_path))
    assert type(processor.image_processor).__name__ == steps
    for mode in ("L", "RGBA", "P", "RGB"):
        inputs = processor(images=Image.fromarray(picture()).convert(mode), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    expected = Image.fromarray(picture()).resize((32, 32), 2)
    wanted = (torch.tensor(np.asarray(expected)).permute(2, 0, 1) / 255 - 0.4) / 0.2
    if "crop_size" not in common:
        torch.testing.assert_close(inputs["pixel_values"][0], wanted, atol=2e-2, rtol=0)  # a step of 8 bits
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "OddImageProcessor"}))
    with pytest.raises(ValueError, match="needs torchvision here; pass one that needs Pillow alone"):
        build_processor(model.config, tiny_tokenizer(), image_processor=str(tmp_path))
    with pytest.raises(ValueError, match="holds no image processor"):
        build_processor(model.config, tiny_tokenizer(), image_processor=str(tmp_path / "nowhere"))


HEARING = [(name, "audio") for name in EARS] + [(name, "speech") for name in EARS if "Whisper" in name]


@pytest.mark.parametrize(("name", "kind"), HEARING, ids=[f"{name}-{kind}" for name, kind in HEARING])
def test_an_ear_of_any_kind_hears_through_its_own_front_end(name, kind, tmp_path):
    """Whole and from a folder; features are the extractor's own; saved and loaded."""
    whole, extractor = ear(name)
    whole.save_pretrained(tmp_path / "tower")
    extractor.save_pretrained(tmp_path / "tower")
    settings = {"num_audio_query_tokens": 5, "num_speech_query_tokens": 3}
    has_decoder = name in ("Whisper", "Whisper v3")
    if kind == "audio" or not has_decoder:
        settings[f"{kind}_connector_config"] = {**SMALL, "num_hidden_layers": 2, "vocab_size": 9}
    llm = parts()["language_model"]
    model, other = (
        from_pretrained_parts(llm, **{f"{kind}_tower": given}, **settings).eval()
        for given in (str(tmp_path / "tower"), whole)
    )
    state = other.state_dict()
    towers = {key: tensor for key, tensor in model.state_dict().items() if "_tower" in key}
    assert towers and all(torch.equal(tensor, state[key]) for key, tensor in towers.items())
    if kind == "speech":
        assert type(model.model.speech_connector).__name__ == (
            "SpeechConnector" if has_decoder else "QFormerConnector"
        )

    given = str(tmp_path / "tower") if kind == "audio" else None
    processor = build_processor(model.config, tiny_tokenizer(), audio_feature_extractor=given)
    rate = extractor.sampling_rate
    clip = tone(2.5, rate=rate)
    inputs = processor(text=f"<{kind}> what", **{kind: clip}, return_tensors="pt")
    features = inputs["input_values" if kind == "audio" else "input_features"]
    window = processor.feature_extractor.samples_of(kind)
    for number, found in enumerate(features):
        piece = clip[number * window : (number + 1) * window]
        own = extractor(piece, sampling_rate=rate, return_tensors="pt")[extractor.model_input_names[0]]
        torch.testing.assert_close(found, own[0], atol=1e-5, rtol=0)
    assert len(features) == -(-len(clip) // window)
    expected = model(**inputs).logits
    assert expected.isfinite().all()

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "model")
    again = AutoProcessor.from_pretrained(tmp_path / "model")(
        text=f"<{kind}> what", **{kind: clip}, return_tensors="pt"
    )
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    assert torch.equal(loaded(**again).logits, expected)


def test_an_ear_with_its_own_front_end_asks_for_it(tmp_path):
    whole, _ = ear("AST")
    settings = {"audio_connector_config": {**SMALL, "vocab_size": 9}}
    model = from_pretrained_parts(parts()["language_model"], audio_tower=whole, **settings)
    _, narrow = ear("Whisper")
    for given, reason in (
        (None, "hears through its own feature extractor; pass `audio_feature_extractor`"),
        (str(tmp_path), "could not be loaded"),
        (BitImageProcessorPil(), "is a BitImageProcessorPil; known are"),
        (narrow, r"makes features of shape .* 'audio-spectrogram-transformer' model does not take"),
    ):
        with pytest.raises(ValueError, match=reason):
            build_processor(model.config, tiny_tokenizer(), audio_feature_extractor=given)


def test_a_tokenizer_that_uses_placeholders_as_words_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = tiny_config({"vocab_size": len(tokenizer)})
    with pytest.raises(ValueError, match=r"has \{'<image>': \d+\} among the LLM's own \d+ words"):
        build_processor(config, tokenizer)
    llm = parts()["language_model"]
    llm.resize_token_embeddings(len(tokenizer))
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights are to be read")
    with pytest.raises(ValueError, match="among the LLM's own"):
        from_pretrained_parts(str(tmp_path))


def test_frozen_towers_stay_in_use_while_the_rest_trains():
    model = from_pretrained_parts(**parts(), num_speech_query_tokens=3).train()
    assert model.training and model.model.language_model.training and model.model.vision_connector.training
    model.requires_grad_(False).train()
    assert not any(getattr(model.model, f"{name}_tower").training for name in ("vision", "speech", "audio"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"vision_twoer": "x"}, "knows no `vision_twoer`; did you mean `vision_tower`"),
        ({"video_poling": "none"}, "did you mean `video_pooling`"),
        ({"torch_dtype": torch.float32}, "it is called `dtype`"),
        ({"device_map": "cpu"}, "knows no `device_map`; it is no field"),
        ({"dtype": torch.bfloat16}, "`language_model` has been loaded in float32, but `dtype` asks for bfloat16"),
        ({"language_model": tiny_model(DENSE)}, "is a Uni-MoE already"),
        ({"vision_tower": "nowhere/to/be"}, "`vision_tower`: There is no checkpoint"),
    ],
)
def test_an_argument_that_is_not_understood_is_named(arguments, reason):
    given = {"language_model": parts()["language_model"], **arguments}
    with pytest.raises(ValueError, match=reason):
        from_pretrained_parts(**given)


def test_a_processor_needs_what_the_tower_came_with(tmp_path):
    model = from_pretrained_parts(parts()["language_model"], vision_tower=vision_tower("dinov2"))
    with pytest.raises(ValueError, match="'dinov2' model, which sees through its own image processor"):
        build_processor(model.config, tiny_tokenizer())
    with pytest.raises(ValueError, match="`image_processor` is a int"):
        build_processor(model.config, tiny_tokenizer(), image_processor=3)
    tiny_tokenizer().save_pretrained(tmp_path)
    given = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor = build_processor(model.config, str(tmp_path), image_processor=given)
    assert processor.image_token_id == model.config.image_token_id
    with pytest.raises(ValueError, match="could not be loaded"):
        build_processor(model.config, str(tmp_path / "nowhere"), image_processor=given)
