"""The connectors: shapes, which token sees which, and what is trained."""

import copy

import pytest
import torch
from tiny import EXACT, FEATURES, ROUNDING, make_inputs, tiny_config, tiny_model

from uni_moe_hf.hub.connectors_uni_moe import QFormerConnector, SpeechConnector


HIDDEN, TOWER, QUERIES = 32, 32, 5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(num_speech_query_tokens=QUERIES, num_audio_query_tokens=QUERIES).model


@pytest.fixture
def connector(request, model):
    return copy.deepcopy(getattr(model, f"{request.param}_connector"))


def windows(count: int = 3, positions: int = 7) -> torch.Tensor:
    """`(count, positions, TOWER)` features as a tower gives them."""
    return torch.randn(count, positions, TOWER, generator=torch.Generator().manual_seed(positions))


def output_after_changing_query(connector, query: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The connector's output before and after one of its queries is another."""
    before = connector(windows())
    with torch.no_grad():
        connector.query_tokens[:, query] += torch.linspace(-1, 1, connector.query_tokens.shape[-1])
    return before, connector(windows())


with_queries = pytest.mark.parametrize("connector", ["speech", "audio"], indirect=True)
every_connector = pytest.mark.parametrize("connector", ["vision", "speech", "audio"], indirect=True)


@with_queries
@pytest.mark.parametrize("positions", [1, 7, 50])
def test_every_window_becomes_as_many_tokens_as_there_are_queries(connector, positions):
    assert connector(windows(3, positions)).shape == (3, QUERIES, HIDDEN)


def test_vision_connector_keeps_the_number_of_tokens(model):
    assert model.vision_connector(windows(3, 7)).shape == (3, 7, HIDDEN)


@every_connector
def test_window_does_not_depend_on_the_others(connector):
    features = windows()
    alone = torch.cat([connector(features[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(connector(features), alone, **ROUNDING)


@pytest.mark.parametrize("connector", ["speech"], indirect=True)
@pytest.mark.parametrize("query", range(QUERIES))
def test_speech_query_influences_itself_and_later_ones_only(connector, query):
    before, after = output_after_changing_query(connector, query)
    torch.testing.assert_close(after[:, :query], before[:, :query], **ROUNDING)
    changes = (after - before).abs().amax(dim=(0, 2))
    assert (changes[query:] > 1e-4).all()


@pytest.mark.parametrize("connector", ["audio"], indirect=True)
@pytest.mark.parametrize("query", range(QUERIES))
def test_audio_query_influences_all_queries(connector, query):
    before, after = output_after_changing_query(connector, query)
    assert ((after - before).abs().amax(dim=(0, 2)) > 1e-5).all()


@with_queries
@pytest.mark.parametrize("position", [0, 6])
def test_every_query_sees_every_position_of_the_window(connector, position):
    features = windows()
    before = connector(features)
    features[:, position] += 1
    assert ((connector(features) - before).abs().amax(dim=2) > 1e-5).all()


@with_queries
def test_without_positions_of_its_own_the_order_of_the_window_does_not_matter(connector):
    features = windows()
    torch.testing.assert_close(connector(features.flip(1)), connector(features), atol=1e-5, rtol=1e-5)


def test_vision_tokens_do_not_see_each_other(model):
    features = windows()
    before = model.vision_connector(features)
    features[:, 2] += 1
    changes = (model.vision_connector(features) - before).abs().amax(dim=(0, 2))
    assert changes[2] > 1e-4 and (changes[[0, 1, 3, 4, 5, 6]] == 0).all()


def test_vision_connector_is_two_linear_layers_around_an_exact_gelu(model):
    projector, x = model.vision_connector.projector, windows()
    inner = x @ projector[0].weight.T + projector[0].bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = inner @ projector[2].weight.T + projector[2].bias
    torch.testing.assert_close(model.vision_connector(x), expected, **ROUNDING)


@with_queries
def test_queries_and_projector_learn(connector):
    connector(windows()).square().sum().backward()
    gradients = [connector.query_tokens.grad, connector.projector.weight.grad, connector.projector.bias.grad]
    assert all(gradient.abs().amax() > 0 for gradient in gradients)
    assert (connector.query_tokens.grad.abs().amax(dim=-1) > 0).all()


@every_connector
def test_every_parameter_of_a_connector_takes_part(connector):
    connector(windows()).square().sum().backward()
    idle = [name for name, parameter in connector.named_parameters() if parameter.grad is None]
    assert idle == []


def test_building_a_connector_leaves_the_config_as_it_was():
    config = tiny_config()
    before = config.to_dict()
    SpeechConnector(config)
    QFormerConnector(config)
    assert config.to_dict() == before


def test_speech_connector_carries_no_word_embeddings(model):
    assert not [name for name in model.speech_connector.state_dict() if "embed_tokens" in name]


@with_queries
def test_connector_runs_in_bf16(connector):
    output = connector.to(torch.bfloat16)(windows().to(torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


# Many clips, and clips of several lengths


@pytest.mark.parametrize("modality", ["image", "video", "audio", "speech"])
def test_clips_in_groups_give_the_numbers_of_each_alone(modality):
    """And no tower is given more than a few at once, so memory does not grow with the length of a recording."""
    model = tiny_model().eval().requires_grad_(False)
    inputs = make_inputs(model.config, (modality,) * 19, frames=2)
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    sizes = []
    tower = getattr(model.model, f"{ {'image': 'vision', 'video': 'vision'}.get(modality, modality) }_tower")
    tower.register_forward_hook(lambda _, args, out: sizes.append(len(out.last_hidden_state)))
    together = model.model.encode_media(**media)[modality]
    count = len(media[FEATURES[modality]]) * (2 if modality == "video" else 1)
    assert max(sizes) <= 32 and sum(sizes) == len(together.last_hidden_state) == count
    for index in (0, 8, 18):
        one = {name: value[index : index + 1] for name, value in media.items()}
        alone = model.model.encode_media(**one)[modality]
        torch.testing.assert_close(together.pooler_output[index], alone.pooler_output[0], **ROUNDING)


def test_a_cut_window_is_heard_as_its_part_of_the_full_window_is_placed():
    """Positions are those of the full window, and what follows a window has no influence."""
    model = tiny_model().eval()
    tower = model.model.speech_tower
    features = torch.randn(2, 80, 100)
    with torch.no_grad():
        full = tower(features).last_hidden_state
        cut = tower(features[..., :60]).last_hidden_state
        embedded = tower.conv2(torch.nn.functional.gelu(tower.conv1(features[..., :60])))
        expected = torch.nn.functional.gelu(embedded).transpose(1, 2) + tower.embed_positions.weight[:30]
        for layer in tower.layers:
            expected = layer(expected, None)
    assert full.shape == (2, 50, 32) and cut.shape == (2, 30, 32)
    torch.testing.assert_close(cut, tower.layer_norm(expected), **EXACT)


def test_windows_of_several_lengths_do_not_touch_each_other():
    model = tiny_model().eval()
    features, lengths = torch.randn(4, 80, 100), torch.tensor([100, 40, 100, 20])
    mask = (torch.arange(100) < lengths[:, None]).long()
    with torch.no_grad():
        together = model.model.get_speech_features(features, mask).pooler_output
        for index, length in enumerate(lengths.tolist()):
            alone = model.model.get_speech_features(features[index : index + 1, :, :length]).pooler_output
            torch.testing.assert_close(together[index], alone[0], **ROUNDING)
        noise = features.masked_fill(mask[:, None] == 0, 9.0)  # behind the end
        assert torch.equal(model.model.get_speech_features(noise, mask).pooler_output, together)
    assert together.shape == (4, model.config.num_speech_query_tokens, 32)
