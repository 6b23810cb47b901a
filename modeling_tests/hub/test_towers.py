"""BEATs: parity with the original, padding, and the library's ways to run it."""

import copy

import pytest
import torch
from golden import FIXTURES
from safetensors.torch import load_file
from tiny import ROUNDING, checkpoint_activations
from transformers.models.t5.modeling_t5 import T5Attention

from uni_moe_hf import BeatsConfig, BeatsModel
from uni_moe_hf.mixtures.beats_file import beats_config


@pytest.fixture(scope="module")
def beats() -> BeatsModel:
    """The tiny random checkpoint whose outputs the original code computed."""
    checkpoint = torch.load(FIXTURES / "audio" / "beats.pt", weights_only=True)
    weights = checkpoint["model"]
    # The original repeats the bias table in every layer and keeps weight norm's factors.
    norm, direction = (weights.pop(f"encoder.pos_conv.0.weight_{factor}") for factor in "gv")
    weights["encoder.pos_conv.weight"] = direction * (norm / direction.norm(dim=(0, 1), keepdim=True))
    weights["encoder.pos_conv.bias"] = weights.pop("encoder.pos_conv.0.bias")
    for name in [name for name in weights if "relative_attention_bias" in name]:
        weights["encoder.relative_attention_bias.weight"] = weights.pop(name)
    model = BeatsModel(beats_config(checkpoint["cfg"])).eval()
    model.load_state_dict(weights, strict=True)
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "audio" / "frontends.safetensors")


def fbanks(windows: int = 2, frames: int = 96, seed: int = 0) -> torch.Tensor:
    """`(windows, frames, 128)` random input; 48 tokens for 96 frames."""
    return torch.randn(windows, frames, 128, generator=torch.Generator().manual_seed(seed))


def mask_of(*valid: int, frames: int = 96) -> torch.Tensor:
    """`(windows, frames)` with as many leading ones per window."""
    return (torch.arange(frames) < torch.tensor(valid)[:, None]).long()


@pytest.mark.parametrize("clip", ["second", "odd"])
def test_output_equals_the_original(beats, golden, clip):
    output = beats(golden[f"{clip}/fbank_normalized"][None]).last_hidden_state
    torch.testing.assert_close(output, golden[f"{clip}/beats_last_hidden_state"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (32, 80), (32, 128)])
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_relative_buckets_are_those_of_t5(num_buckets, max_distance, length):
    config = BeatsConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        patch_embedding_size=8,
        num_conv_pos_embedding_groups=1,
        num_buckets=num_buckets,
        max_bucket_distance=max_distance,
    )
    positions = torch.arange(length)
    expected = T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], True, num_buckets=num_buckets, max_distance=max_distance
    )
    buckets = BeatsModel(config).encoder.relative_buckets(length, torch.device("cpu"))
    assert torch.equal(buckets, expected)


@pytest.mark.parametrize(("frames", "tokens"), [(16, 8), (31, 8), (32, 16), (98, 48)])
def test_every_whole_square_of_the_filterbank_is_a_token(beats, frames, tokens):
    assert beats(fbanks(2, frames)).last_hidden_state.shape == (2, tokens, beats.config.hidden_size)


def test_masked_tail_does_not_influence_valid_tokens(beats):
    """Frames 0 to 47 are the first 24 tokens, exactly."""
    values, mask = fbanks(), mask_of(48, 48)
    other = values.clone()
    other[:, 48:] = 5 * fbanks(seed=1)[:, 48:]
    first, second = (beats(x, mask).last_hidden_state[:, :24] for x in (values, other))
    torch.testing.assert_close(first, second, **ROUNDING)
    unmasked = beats(other).last_hidden_state[:, :24]
    assert (unmasked - second).abs().max() > 1e-2


def test_masked_window_equals_the_cut_one(beats):
    values = fbanks()
    cut = beats(values[:, :48]).last_hidden_state
    padded = beats(values, mask_of(48, 48)).last_hidden_state[:, :24]
    torch.testing.assert_close(padded, cut, atol=1e-5, rtol=0)


def test_mask_of_ones_is_no_mask(beats):
    values = fbanks()
    masked, unmasked = beats(values, mask_of(96, 96)), beats(values)
    torch.testing.assert_close(masked.last_hidden_state, unmasked.last_hidden_state, atol=0, rtol=0)


def test_batch_equals_its_windows_one_by_one(beats):
    values, mask = fbanks(3), mask_of(96, 50, 1)
    alone = [beats(values[i : i + 1], mask[i : i + 1]).last_hidden_state for i in range(3)]
    torch.testing.assert_close(beats(values, mask).last_hidden_state, torch.cat(alone), atol=1e-5, rtol=0)


def test_window_of_padding_alone_stays_finite(beats):
    assert beats(fbanks(1), mask_of(0)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("valid", "frames", "tokens", "padding_from"),
    [(96, 96, 48, 48), (48, 96, 48, 24), (47, 96, 48, 24), (46, 96, 48, 23), (1, 98, 48, 1), (97, 98, 48, 48)],
)
def test_token_is_padding_when_its_whole_run_of_frames_is(beats, valid, frames, tokens, padding_from):
    mask = beats.token_padding_mask(mask_of(valid, frames=frames), tokens)
    assert torch.equal(mask, torch.arange(tokens)[None] >= padding_from)


def test_mask_is_stretched_when_there_are_more_tokens_than_frames(beats):
    mask = beats.token_padding_mask(mask_of(3, frames=4), 8)
    assert mask.tolist() == [[False] * 6 + [True] * 2]


def with_attention(beats: BeatsModel, implementation: str) -> BeatsModel:
    twin = copy.deepcopy(beats)
    twin.set_attn_implementation(implementation)
    return twin


def test_eager_attention_equals_sdpa(beats):
    inputs = fbanks(), mask_of(96, 50)
    eager, sdpa = (with_attention(beats, name)(*inputs).last_hidden_state for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=0)


def test_attention_of_every_layer_sums_to_one_over_valid_tokens(beats):
    outputs = with_attention(beats, "eager")(fbanks(1), mask_of(48), output_attentions=True)
    assert len(outputs.attentions) == beats.config.num_hidden_layers
    for weights in outputs.attentions:
        assert weights.shape == (1, beats.config.num_attention_heads, 48, 48)
        assert (weights[..., 24:] == 0).all()
        torch.testing.assert_close(weights[..., :24].sum(dim=-1), torch.ones(weights.shape[:3]), atol=1e-5, rtol=0)


def test_hidden_states_end_with_the_output(beats):
    outputs = beats(fbanks(), output_hidden_states=True)
    assert len(outputs.hidden_states) == beats.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_gradient_checkpointing_gives_the_same_output_and_gradients(beats):
    """Within 1e-5 of each gradient's largest value."""
    results = []
    for checkpointing in (False, True):
        model = copy.deepcopy(beats).train()
        if checkpointing:
            checkpoint_activations(model)
            assert all(layer.gradient_checkpointing for layer in model.encoder.layers)
        output = model(fbanks(), mask_of(96, 50)).last_hidden_state
        output.square().mean().backward()
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (output, gradients), (checkpointed_output, checkpointed_gradients) = results
    torch.testing.assert_close(checkpointed_output, output, **ROUNDING)
    for name, gradient in gradients.items():
        assert (checkpointed_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_bf16_output_is_near_the_float32_one(beats):
    """Within 0.1 of a layer norm's output."""
    model = copy.deepcopy(beats).to(torch.bfloat16)
    output = model(fbanks(), mask_of(96, 50)).last_hidden_state
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), beats(fbanks(), mask_of(96, 50)).last_hidden_state, atol=0.1, rtol=0)


def test_runs_under_autocast(beats):
    """Within 0.1 of a layer norm's output."""
    with torch.autocast("cpu", torch.bfloat16):
        output = beats(fbanks(), mask_of(96, 50)).last_hidden_state
    torch.testing.assert_close(output.float(), beats(fbanks(), mask_of(96, 50)).last_hidden_state, atol=0.1, rtol=0)


@pytest.mark.parametrize("shape", [(1, 96, 80), (1, 15, 128), (1, 128, 96)], ids=str)
def test_input_of_another_shape_is_refused_with_both_shapes(beats, shape):
    with pytest.raises(ValueError) as caught:
        beats(torch.zeros(shape))
    assert str(shape) in str(caught.value) and "128" in str(caught.value) and "16" in str(caught.value)


def test_position_convolution_starts_as_in_the_original():
    """Normal with a variance of 4 / (kernel * width); the standard deviation within 5 %."""
    config = BeatsConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    convolution = BeatsModel(config).encoder.pos_conv
    assert convolution.weight.std().item() == pytest.approx((4 / (16 * 64)) ** 0.5, rel=0.05)
    assert (convolution.bias == 0).all()


def test_saved_encoder_loads_equal(beats, tmp_path):
    beats.save_pretrained(tmp_path)
    loaded = BeatsModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in beats.state_dict().items())
    assert torch.equal(loaded(fbanks()).last_hidden_state, beats(fbanks()).last_hidden_state)
