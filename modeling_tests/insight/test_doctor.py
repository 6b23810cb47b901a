"""A healthy model is left in peace; what was spoilt is named."""

import json

import numpy as np
import pytest
import torch
from tiny import labels_of, make_inputs, tiny_model, tiny_processor
from tiny_training import rows, write_media

from uni_moe_hf.cli import main as uni_moe
from uni_moe_hf.insight import doctor
from uni_moe_hf.insight.routing_tables import RoutingTables


def healthy():
    model = tiny_model(stage="moe")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.gate.weight.normal_(std=0.5)  # far from where routers start
    processor = tiny_processor(model.config)
    model.generation_config.eos_token_id = 2
    return model, processor


def examined(model, processor, folder, rows=None) -> list[doctor.Check]:
    """Through files, as the command does it."""
    for part in (model, processor):
        part.save_pretrained(folder)
    return doctor.examine(str(folder), lambda: load(folder), rows)


def load(folder):
    import argparse

    from uni_moe_hf.cli.common import load_checkpoint

    return load_checkpoint(argparse.Namespace(checkpoint=str(folder), device="cpu", dtype="auto"))


def test_a_healthy_model_is_ok_throughout(tmp_path, capsys):
    model, processor = healthy()
    checks = examined(model, processor, tmp_path)
    assert [check.state for check in checks] == ["ok"] * 9, "\n".join(map(str, checks))
    assert uni_moe(["doctor", str(tmp_path), "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == [check.name for check in checks]


def nan(model, processor, folder):
    model.lm_head.weight.data[3, 4] = float("nan")


def empty_connector(model, processor, folder):
    for parameter in model.model.vision_connector.projector.parameters():
        parameter.data.zero_()


def no_adapters(model, processor, folder):
    for experts in model._experts():
        experts.lora.gate_up_b.data.zero_()
        experts.lora.down_b.data.zero_()


def fresh_routers(model, processor, folder):
    for layer in model.model.language_model.layers:
        layer.mlp.gate.weight.data.normal_(std=model.config.text_config.initializer_range)
        layer.mlp.gate.weight.data += 0.3 * torch.randn(4, 1) * torch.randn(1, 32)  # loads were evened


def blind_router(model, processor, folder):
    model.model.language_model.layers[1].mlp.gate.weight.data[:] = 0.1


def other_ids(model, processor, folder):
    model.config.image_token_id, model.config.video_token_id = 900, 901


def other_processor(model, processor, folder):
    processor.num_audio_query_tokens += 1


def stops_elsewhere(model, processor, folder):
    model.generation_config.eos_token_id = 7


def never_stops(model, processor, folder):
    model.generation_config.eos_token_id = None
    model.config.text_config.eos_token_id = None


def blind_template(model, processor, folder):
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}QUESTION {% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, r"weights .*1 of .* numbers of `lm_head.weight` are NaN or infinite"),
        (empty_connector, r"weights .*`model.vision_connector.projector.*weight` is all zeros"),
        (no_adapters, r"adapters .*the experts' LoRA adds nothing, though stage 3 trains it"),
        (fresh_routers, r"routers .*as they were initialised"),
        (blind_router, r"routers .*all rows of the router in layer 1 are equal"),
        (other_ids, r"processor .*<image> is token \d+ in the tokenizer and 900 in the model"),
        (other_processor, r"media .*an? audio clip does not get through"),
        (stops_elsewhere, r"stop token .*ends answers with '</s>' \(token 2\), generation stops at .*\(7\); add 2"),
        (never_stops, r"stop token .*has no `eos_token_id`"),
        (blind_template, r"chat template .*no placeholder for image, video, audio, speech"),
    ],
)
def test_what_was_spoilt_is_named_and_nothing_else(tmp_path, capsys, spoil, message):
    model, processor = healthy()
    spoil(model, processor, tmp_path)
    checks = examined(model, processor, tmp_path)
    wrong = [str(check) for check in checks if check.state == "wrong"]
    assert len(wrong) == 1, "\n".join(map(str, checks))
    assert doctor.re.search(message, wrong[0]), wrong[0]
    assert uni_moe(["doctor", str(tmp_path)]) == 1
    assert wrong[0] in capsys.readouterr().out


def test_missing_weights_and_an_adapter_in_place_of_a_model_are_said(tmp_path, capsys):
    model, processor = healthy()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.gate" not in k}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    processor.save_pretrained(tmp_path / "model")
    assert uni_moe(["doctor", str(tmp_path / "model")]) == 1
    assert "mlp.gate" in capsys.readouterr().out
    (tmp_path / "adapter/merged").mkdir(parents=True)
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert uni_moe(["doctor", str(tmp_path / "adapter")]) == 1
    assert "holds an adapter, no model; look at" in capsys.readouterr().out


def test_a_medium_that_no_answer_depends_on_is_wrong_and_so_is_a_connector_off_scale(tmp_path):
    model, processor = healthy()
    media = write_media(tmp_path, 2)
    data = json.loads(json.dumps(rows(12)).replace('"path": "', f'"path": "{media}/'))
    for row in data:
        for part in row["messages"][0]["content"]:
            if "video" in part:
                part["video"] = [f"{media}/{frame}" for frame in part["video"]]
    fine = {check.name: check for check in doctor.examine_rows(model, processor, data)}
    assert {"connectors", "experts", "image", "video", "audio", "speech"} <= fine.keys()
    assert fine["connectors"].state == "ok"
    last = model.model.vision_connector.projector
    last = list(last.modules())[-1] if not hasattr(last, "weight") else last
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(0.1)
    spoilt = {check.name: check for check in doctor.examine_rows(model, processor, data)}
    assert spoilt["image"].state == "wrong" and "not used at all" in spoilt["image"].text
    assert spoilt["speech"].state != "wrong"
    with torch.no_grad():
        last.bias.fill_(1e6)
    off = {check.name: check for check in doctor.examine_rows(model, processor, data)}
    assert off["connectors"].state == "wrong" and "times as long as words'" in off["connectors"].text


def test_copies_of_one_expert_and_a_missing_template_are_said():
    model = tiny_model({"shared_expert_base": True})
    assert doctor.check_adapters(model).state == "ok"
    for experts in model._experts():
        for tensor in (experts.lora.gate_up_b, experts.lora.down_b):
            tensor.data[:2] = 0.0
    check = doctor.check_adapters(model)
    assert check.state == "look" and "0 and 1 are the same network" in check.text
    for experts in model._experts():
        experts.lora.gate_up_b.data.zero_()
        experts.lora.down_b.data.zero_()
    check = doctor.check_adapters(model)
    assert check.state == "wrong" and "all 4 experts are the same network" in check.text
    processor = tiny_processor(model.config)
    processor.chat_template = None
    assert doctor.check_processor(model, processor)[-1].text.startswith("there is none")
    assert doctor.check_stop_token(model, processor).state == "look"


def test_bad_rows_are_findings_beside_the_others(tmp_path):
    model, processor = healthy()
    checks = examined(model, processor, tmp_path, str(tmp_path / "nowhere.jsonl"))
    assert [check.name for check in checks if check.state == "wrong"] == ["rows"] and len(checks) > 6
    (tmp_path / "config.json").write_text("[]")
    checks = doctor.examine(str(tmp_path), lambda: load(tmp_path))
    assert checks[-1].name == "loading" and checks[-1].state == "wrong"


def test_a_connector_off_scale_is_found_without_rows_and_two_experts_are_no_reason_to_cry(tmp_path):
    model, processor = healthy()
    last = list(model.model.vision_connector.projector.modules())[-1]
    with torch.no_grad():
        last.weight.mul_(1e6)
    checks = examined(model, processor, tmp_path)
    assert [check.name for check in checks if check.state == "wrong"] == ["connectors"]
    two = tiny_model({"num_experts": 2, "num_experts_per_tok": 1}, stage="moe")
    assert doctor.check_routers(two).state == "ok"


def test_the_same_clip_everywhere_is_judged_by_what_a_blank_one_costs(monkeypatch):
    model, _ = healthy()
    inputs = make_inputs(model.config, *[("image", 4)] * 8)
    inputs["pixel_values"][:] = inputs["pixel_values"][:1]
    batch = {**inputs, "labels": labels_of(model.config, inputs)}
    losses = iter([[1.0] * 8, [1.0] * 8, [1.5] * 8])
    monkeypatch.setattr(doctor, "answer_losses", lambda *_: (next(losses), [True] * 8))
    check = doctor.check_use(model, {"image": [batch]}, "image")
    assert check.state == "ok" and "1.500 blank" in check.text and "another row" not in check.text


def tables_of(load: list[list[int]]) -> RoutingTables:
    counts = np.array(load)[None, :, None, :] * np.array([1, 0, 0, 0, 0])[None, None, :, None]
    tokens = np.zeros(10, dtype=int)
    names = ("a", "b", "c")
    return RoutingTables(
        counts, counts, counts[0, :, 0, :, None] * np.eye(3, dtype=int), tokens, tokens, np.zeros((2, 10)), ["text"],
        np.zeros(1), np.zeros(1, dtype=bool), (0, 1), names, 1,
    )  # fmt: skip


def test_dead_and_collapsed_experts_are_told_apart():
    assert doctor.check_experts(tables_of([[3, 3, 4], [2, 5, 3]])).state == "ok"
    dead = doctor.check_experts(tables_of([[5, 5, 0], [2, 5, 3]]))
    assert dead.state == "wrong" and "1 of 6" in dead.text and "c in layer 0" in dead.text
    assert doctor.check_experts(tables_of([[500, 500, 1], [2, 5, 3]])).state == "look"
