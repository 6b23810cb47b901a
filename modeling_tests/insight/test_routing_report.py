"""What the report counts and measures, against routers that were planted."""

import json
import re

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import MIXED, labels_of, make_inputs, tiny_model, tiny_processor
from tiny_training import rows, write_media

from uni_moe_hf import UniMoEDataCollator, prepare_stage, routing_report
from uni_moe_hf.cli import main as uni_moe
from uni_moe_hf.insight.examples import example_of
from uni_moe_hf.insight.routing_tables import trace_routing
from uni_moe_hf.insight.specialisation import (
    information_of_rows,
    information_of_types,
    knock_out,
    without_expert,
)
from uni_moe_hf.mixtures.routing import TOKEN_TYPES, routers_of, token_types


ROWS = ((MIXED[0], 6), ("speech", 7), ("audio", 5), ("video", 8), (9,), MIXED, (1, "image", "audio"), (12,))


@pytest.fixture(scope="module")
def model():
    """Five experts, one for each type of token, and one of them for each token. Not to be changed by tests."""
    return tiny_model({"num_experts": 5, "num_experts_per_tok": 1, "expert_names": [*"abcde"]})


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"), 24)


def batches_of(model, count: int = 4, labelled: bool = True) -> list[dict]:
    made = [make_inputs(model.config, *ROWS, seed=seed) for seed in range(count)]
    return [{**batch, "labels": labels_of(model.config, batch)} if labelled else batch for batch in made]


def planted(model, batch_types, choose):
    """Hooks that make routers choose `choose(types)` for the tokens of the batch under way."""

    def hook(router, args, output):
        logits, weights, chosen = output
        wanted = choose(batch_types["now"].flatten())[:, None].expand_as(chosen).contiguous()
        return torch.zeros_like(logits).scatter_(1, wanted, 9.0), torch.ones_like(weights), wanted

    return [router.register_forward_hook(hook) for _, router in routers_of(model)[1]]


def traced(model, batches, choose):
    types: dict = {}

    def note(module, args, kwargs):
        types["now"] = token_types(module.config, kwargs["input_ids"])

    hooks = [routers_of(model)[0].register_forward_pre_hook(note, with_kwargs=True), *planted(model, types, choose)]
    try:
        return trace_routing(model, batches)
    finally:
        for hook in hooks:
            hook.remove()


def test_sums_equal_the_tokens_under_either_padding():
    model = tiny_model({"num_experts": 4})
    tokens = 0
    for padding in ("left", "right"):
        inputs = make_inputs(model.config, *ROWS, padding=padding)
        tables = trace_routing(model, [inputs])
        tokens = int(inputs["attention_mask"].sum())
        assert tables.counts.shape == (8, 2, 5, 4)
        assert (tables.counts.sum(axis=(0, 2, 3)) == 2 * tokens).all()
        assert tables.weights.sum(axis=(0, 2, 3)) == pytest.approx([tokens, tokens])
        assert (np.diagonal(tables.together, axis1=1, axis2=2) == tables.counts.sum(axis=(0, 2))).all()
        assert tables.together.sum() == 2 * 2 * 2 * tokens  # each token: two experts with themselves and one another
        assert sum(tables.num_tokens.values()) == tokens == tables.heaviest.shape[1]
        assert sum(sum(by_type.values()) for _, by_type in tables.paths(10**6)) == tokens
        assert tables.kinds[:5] == ["image", "speech", "audio", "video", "text"]
        assert np.isnan(tables.losses).all()


def test_a_router_that_specialises_tells_nearly_all_and_a_random_one_nothing(model):
    batches = batches_of(model, 12)
    tables = traced(model, batches, lambda types: types)
    for found in information_of_types(tables):
        assert found.value.value > 0.9 * found.bound and found.share > 0.9
        assert found.value.low <= found.value.value <= found.value.high
        assert found.shuffled < 0.02 * found.bound
    assert tables.paths()[0][0] == (0, 0) and set(tables.paths()[0][1]) == {"text"}
    generator = torch.Generator().manual_seed(0)
    chance = traced(model, batches, lambda types: torch.randint(0, 5, types.shape, generator=generator))
    assert max(found.share for found in information_of_types(chance)) < 0.02
    assert max(found.value.value for found in information_of_types(chance)) < 0.02
    rows_ = [found.share for found in information_of_rows(chance)]
    assert max(rows_) < 0.05  # 96 rows of 8 kinds


def test_the_expert_that_is_used_is_missed_and_one_that_is_not_gives_exactly_nothing(model):
    batches = batches_of(model, 2)
    with torch.no_grad():  # what the model says with expert 0 alone is made the right answer
        hooks = [
            router.register_forward_hook(
                lambda router, args, output: (
                    torch.tensor([9.0, 5.0, 1.0, 0.0, 0.0]).expand_as(output[0]),
                    torch.ones_like(output[1]),
                    torch.zeros_like(output[2]),
                )
            )
            for _, router in routers_of(model)[1]
        ]
        try:
            for batch in batches:
                best = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.argmax(-1)
                batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] == -100, -100, best[:, :-1])
            tables = trace_routing(model, batches)
            rises = knock_out(model, batches, tables)
        finally:
            for hook in hooks:
                hook.remove()
    assert set(rises) == {*"abcde"} and set(rises["a"]) == set(tables.kinds)
    assert all(figure.value > 0 for figure in rises["a"].values())
    for name in "bcde":
        assert all(figure.value == figure.low == figure.high == 0.0 for figure in rises[name].values())


def test_without_an_expert_the_others_weights_sum_to_one_and_nothing_is_left_behind():
    model = tiny_model({"num_experts": 3})
    inputs = make_inputs(model.config, *ROWS)
    seen = []
    before = model(**inputs).logits
    with without_expert(model, "1"):
        hook = routers_of(model)[1][0][1].register_forward_hook(lambda m, a, output: seen.append(output))
        assert not torch.equal(model(**inputs).logits, before)
        hook.remove()
    assert (seen[0][2] != 1).all() and torch.allclose(seen[0][1].sum(-1), torch.ones(len(seen[0][1])))
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(ValueError, match="There is no expert 'x'; the model has 0, 1, 2"), without_expert(model, "x"):
        pass
    alone = tiny_model({"num_experts": 1, "num_experts_per_tok": 1})
    with pytest.raises(ValueError, match="'0' is the only expert"), without_expert(alone, "0"):
        pass


def report_rows(media, count: int = 24) -> list[dict]:
    """With paths of their own folder."""
    made = json.loads(json.dumps(rows(count)))
    for row in made:
        for part in row["messages"][0]["content"]:
            if "path" in part:
                part["path"] = str(media / part["path"])
            if "video" in part:
                part["video"] = [str(media / frame) for frame in part["video"]]
    return made


def test_a_report_is_the_same_inside_peft_and_leaves_the_model_as_it_was(media):
    model = tiny_model({"expert_names": ["text", "<b>vision</b>", "audio", "speech"]})
    processor = tiny_processor(model.config)
    plain = routing_report(model, processor, report_rows(media), num_examples=2)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert not model.training
    model.train()
    wrapped = get_peft_model(model, prepare_stage(model, "moe"))
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    inside = routing_report(wrapped, processor, report_rows(media), num_examples=0)
    assert inside.data == plain.data
    assert wrapped.training and sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in wrapped.state_dict().items())
    data = plain.data
    assert data["rows"] == 24 and data["kinds"]["text"] == 4
    assert (
        sum(data["tokens"].values())
        == sum(sum(path["tokens"].values()) for path in plain.sides[0].tables.paths(10**6) and data["paths"])
        or len(data["paths"]) == 10
    )
    assert np.mean(data["utilisation"]["by choice"]["all"], axis=1) == pytest.approx([1, 1], abs=1e-3)
    assert set(data["knock_out"]) == set(data["experts"])
    assert sorted(data["connectors"]["ratios"]) == ["audio", "image", "speech", "video"]


def test_the_page_needs_no_other_file_and_shows_names_as_they_are(media, tmp_path):
    model = tiny_model({"expert_names": ["text", "<b>vision</b>", "audio", "speech"]})
    dense = tiny_model({"mlp_layer_types": ["dense", "dense"]})
    processor = tiny_processor(model.config)
    report = routing_report(model, processor, report_rows(media), compare=dense, names=("here", "stage 1"))
    page = report.save(tmp_path / "new" / "folder").read_text()
    assert len(page) < 3e6 and "<b>vision</b>" not in page.replace("&lt;", "<") or "&lt;b&gt;vision" in page
    assert not re.search(r"""(src|href)=["']?(https?:|//|file:)""", page.replace("http://www.w3.org", ""))
    assert "stage 1 is dense" in page and "prefers-color-scheme: dark" in page
    for name in ("utilisation", "spread", "paths", "together", "layers", "information", "knock-out", "connectors"):
        png, svg = (tmp_path / f"new/folder/figures/{name}.{kind}" for kind in ("png", "svg"))
        assert png.read_bytes()[:4] == b"\x89PNG" and svg.read_text().count("<svg") == 1
    assert list((tmp_path / "new/folder/figures").glob("example-*-image.png"))
    assert json.loads((tmp_path / "new/folder/report.json").read_text()) == json.loads(json.dumps(report.data))


def test_two_mixtures_are_compared_on_the_same_rows(media):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    processor = tiny_processor(model.config)
    report = routing_report(model, processor, report_rows(media), compare=other, num_examples=0)
    assert len(report.data["same_choice"]) == 2 and max(report.data["same_choice"]) < 1
    again = routing_report(model, processor, report_rows(media), compare=model, num_examples=0)
    assert again.data["same_choice"] == [1.0, 1.0]
    assert "compared" in report.figures()


def test_text_alone_many_experts_and_many_layers_are_drawn(tmp_path):
    text = {"num_experts": 64, "num_hidden_layers": 32, "num_experts_per_tok": 6, "mlp_layer_types": ["sparse"] * 32}
    model = tiny_model(text, without=("vision", "audio", "speech"))
    said = [row for row in rows(60) if len(row["messages"][0]["content"]) == 1]
    report = routing_report(model, tiny_processor(model.config), said, without=["0"])
    page = report.save(tmp_path)
    assert page.stat().st_size < 3e6
    assert report.data["tokens"].keys() == {"text"} and report.data["knock_out"].keys() == {"0"}
    assert "connectors" not in report.data


def test_an_example_gives_every_token_of_a_row_an_expert(media):
    model = tiny_model()
    processor = tiny_processor(model.config)
    row = report_rows(media, 6)[5]  # a picture, a sound, speech
    example = example_of(model, processor, row)
    ids = UniMoEDataCollator(processor)([row])["input_ids"]
    assert example.kind == "image+audio+speech" and example.layers == (0, 1)
    texts = [piece for piece, expert in zip(example.pieces, example.experts[0], strict=True) if expert >= 0]
    assert len(texts) == int((token_types(model.config, ids) == TOKEN_TYPES.index("text")).sum())
    assert [clip.modality for clip in example.clips] == ["image", "audio", "speech"]
    assert example.clips[0].grid == (2, 2) and example.clips[0].experts.shape == (2, 4)
    assert {*example.figures()} == {"image", "audio", "speech"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "`limit` is 0, and intervals need 8 rows or more; raise it"),
        ({"rows": 3}, "There are 3 rows, and intervals need 8 or more"),
        ({"modalities": ["smell"]}, "smell: no modality; there are text, image"),
        ({"modalities": ["video"], "only": 1}, "No row of 24 holds video; they hold speech"),
        ({"without": ["x"]}, "There is no expert 'x'; the model has 0, 1, 2, 3"),
        ({"text": {"mlp_layer_types": ["dense", "dense"]}, "towers": False}, "dense and has no connectors"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(media, change, message):
    towers = () if change.pop("towers", True) else ("vision", "audio", "speech")
    model = tiny_model(change.pop("text", None), without=towers)
    data = report_rows(media, change.pop("rows", 24))
    if "only" in change:
        data = [data[change["only"]]] * 24
        change.pop("only")
    if towers:
        data = [data[4]] * 8
    with pytest.raises(ValueError, match=message):
        routing_report(model, tiny_processor(model.config), data, **change)


def test_rows_without_answers_or_files_are_said(media):
    model = tiny_model()
    data = report_rows(media)
    data[0]["messages"][0]["content"][0]["path"] = "nowhere.png"
    for row in data:
        row["messages"] = row["messages"][:1]
    report = routing_report(model, tiny_processor(model.config), data, num_examples=0)
    assert any("1 of 24 rows could not be read" in note for note in report.notes)
    assert any("No row has an answer" in note for note in report.notes) and not report.data["knock_out"]
    assert report.data["rows"] == 23


def test_the_command_writes_the_page_and_says_what_matters(media, tmp_path, capsys):
    model = tiny_model()
    for part in (model, tiny_processor(model.config)):
        part.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in report_rows(media)))
    command = ["report", str(tmp_path / "model"), "--data", str(file), "--output", str(tmp_path / "out")]
    assert uni_moe([*command, "--examples", "1", "--without", "0"]) == 0
    said = capsys.readouterr().out
    assert "The busiest expert is" in said and f"The page is {tmp_path / 'out/report.html'}." in said
    assert uni_moe([*command[:-1], str(file)]) == 1
    assert "cannot be made a folder (File exists); name another one" in capsys.readouterr().err


def test_kinds_that_take_turns_are_all_looked_at_and_rows_of_no_use_are_counted(media):
    model = tiny_model()
    text, image = report_rows(media, 5)[4], report_rows(media, 1)[0]
    data = [*[text, image] * 20, {"nothing": 1}, {"messages": 5}, {}]
    report = routing_report(model, tiny_processor(model.config), data, limit=20, num_examples=1)
    assert {"text", "image"} <= report.data["kinds"].keys()
    assert min(report.data["kinds"]["text"], report.data["kinds"]["image"]) >= 4
    with pytest.raises(ValueError, match="Row 2 is None; rows are dictionaries"):
        routing_report(model, tiny_processor(model.config), [text, None] * 8)
    whole = routing_report(model, tiny_processor(model.config), data, limit=43, num_examples=0)
    assert whole.data["rows"] == 40 and any("3 of 43 rows could not be read" in note for note in whole.notes)


def test_a_model_of_no_numbers_is_no_report_and_names_are_drawn_as_they_are(media, tmp_path):
    model = tiny_model({"expert_names": ["$\\foo$", "a" * 60, "c", "d"]})
    processor = tiny_processor(model.config)
    report = routing_report(model, processor, report_rows(media), num_examples=1)
    assert "$\\foo$" in report.save(tmp_path).read_text()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The loss of model on these rows is no number; `uni-moe doctor`"):
        routing_report(model, processor, report_rows(media))
    fine = tiny_model({"expert_names": ["$\\foo$", "a" * 60, "c", "d"]})
    with pytest.raises(ValueError, match="'after' cannot be compared on the rows of 'before': The loss of after"):
        routing_report(fine, processor, report_rows(media), compare=model, names=("before", "after"))
