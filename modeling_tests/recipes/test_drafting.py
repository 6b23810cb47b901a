"""A first recipe follows from the parts, the rows and the memory at hand, and says why."""

import json

import pytest
import torch
import yaml
from tiny_parts import write_parts
from transformers import PreTrainedModel

from uni_moe_hf.cli import main
from uni_moe_hf.recipes import drafting
from uni_moe_hf.recipes.drafting import draft_recipe
from uni_moe_hf.recipes.recipe import steps_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    write_parts(root)
    return root


def parts(place, *towers: str) -> dict[str, str]:
    given = {"llm": str(place / "language_model")}
    return given | {f"{name}_tower": str(place / f"{name}_tower") for name in towers or ("vision", "speech", "audio")}


def test_a_draft_runs_as_it_is_and_has_an_expert_for_every_modality_of_the_rows(place, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    rows = str(place / "rows.jsonl")
    draft = draft_recipe(parts(place), rows, test=rows, output_dir=str(place / "out"))
    recipe = yaml.safe_load(draft.text)
    assert [step.name for step in steps_of(recipe)] == [
        "connectors", "experts/vision", "experts/audio", "experts/speech", "moe", "evaluation",
        "evaluation_other_media",
    ]  # fmt: skip
    # What it knows of the parts: the decoder of this Whisper has few positions.
    assert recipe["parts"]["num_speech_query_tokens"] <= 16
    assert recipe["experts"]["vision"]["modalities"] == ["image"]
    for section in (recipe["connectors"], *recipe["experts"].values(), recipe["moe"]):
        at_once = section["per_device_train_batch_size"] * section["gradient_accumulation_steps"]
        assert at_once in (8, 16, 32) and not section["gradient_checkpointing"]
    assert draft.text.count("# ") >= 6 and set(draft.plans) == {"connectors", "experts", "moe"}
    assert all(minutes > 0 for minutes in draft.minutes.values())


def test_with_little_memory_batches_are_small_and_layers_are_checkpointed(place, monkeypatch):
    rows = str(place / "rows.jsonl")
    roomy = draft_recipe(parts(place), rows)
    fits = int(1.2 * min(plan.total for plan in roomy.plans.values()))
    monkeypatch.setattr(drafting, "_machine", lambda: (fits, "float32", "cpu"))
    tight = yaml.safe_load(draft_recipe(parts(place), rows).text)["connectors"]
    assert tight["per_device_train_batch_size"] < 32
    monkeypatch.setattr(drafting, "_machine", lambda: (1000, "float32", "cpu"))
    none = draft_recipe(parts(place), rows)
    least = yaml.safe_load(none.text)["moe"]
    assert least["per_device_train_batch_size"] == 1 and least["gradient_checkpointing"]
    assert least["gradient_accumulation_steps"] == 8


def test_a_wide_llm_gets_the_papers_rates_and_a_narrow_one_larger_ones():
    assert [drafting._rate(stage, 4096) for stage in ("connectors", "experts", "moe")] == [2e-5, 4e-5, 4e-5]
    assert drafting._rate("connectors", 1024) == pytest.approx(2.4e-4)
    assert drafting._rate("moe", 128) == pytest.approx(1.3e-3)


@pytest.mark.parametrize(
    ("towers", "row", "words"),
    [
        (("vision",), None, "holds speech in 2 rows, for which no part is given; name a speech tower"),
        (("vision",), {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "holds no media"),
    ],
)  # fmt: skip
def test_rows_that_the_parts_cannot_take_are_named(place, tmp_path, towers, row, words):
    rows = place / "rows.jsonl"
    if row is not None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=words):
        draft_recipe(parts(place, *towers), str(rows))


def test_an_llm_alone_is_refused(place):
    with pytest.raises(ValueError, match="There is no tower"):
        draft_recipe({"llm": str(place / "language_model")}, str(place / "rows.jsonl"))


def test_the_command_writes_a_recipe_once(place, tmp_path, capsys):
    output = tmp_path / "a/recipe.yaml"
    command = ["init", "--llm", str(place / "language_model"), "--vision-tower", str(place / "vision_tower")]
    command += ["--speech-tower", str(place / "speech_tower"), "--audio-tower", str(place / "audio_tower")]
    command += ["--data", str(place / "rows.jsonl"), "--output", str(output)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "connectors" in said and "GB" in said and f"Next: uni-moe train {output}" in said
    before = output.read_text()
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    assert output.read_text() == before and torch.get_default_dtype() == torch.float32
