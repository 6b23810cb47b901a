"""Building models and processors from parts."""

import pytest
import torch
from tiny import DENSE, ROUNDING, film, picture, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, tone
from tiny_parts import parts, save_dino
from transformers import (
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

from uni_moe_hf.hub.configuration_uni_moe import is_sparse
from uni_moe_hf.mixtures.composition import build_processor, from_pretrained_parts


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
