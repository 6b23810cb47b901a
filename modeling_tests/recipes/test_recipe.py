"""One YAML file is the three scripts in a chain: what is finished is kept, what changed and what fails is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import yaml
from PIL import Image
from tiny import ROOT, child_environment, picture, tone
from tiny_parts import write_parts
from transformers import AutoModel

from uni_moe_hf.cli import main
from uni_moe_hf.recipes import recipe as recipes
from uni_moe_hf.recipes.recipe import read_recipe, run_recipe, steps_of


NAMES = ["connectors", "experts/vision", "experts/speech", "moe", "evaluation", "evaluation_other_media"]


def written(folder: Path, **changes) -> Path:
    """A recipe; a section that is `None` is left out."""
    made = {
        "output_dir": str(folder / "out"),
        "parts": {"llm": "an/llm", "vision_tower": "eyes"},
        "shared": {"dataset_name": "rows.jsonl", "logging_steps": 5},
        "connectors": {"learning_rate": 1e-3},
        "experts": {"vision": {"modalities": ["image"]}, "speech": {"modalities": ["speech"], "lora_r": 8}},
        "moe": {"layers": "even"},
        "evaluation": {"task": "short-answers", "data": "test.jsonl", "max_new_tokens": 4},
    }
    made = {name: section for name, section in (made | changes).items() if section is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    return folder / "recipe.yaml"


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Steps that were run, without running them; what each leaves is there."""
    found = []

    def run(step):
        found.append(step.name)
        step.proof.parent.mkdir(parents=True, exist_ok=True)
        step.proof.write_text("{}")

    monkeypatch.setattr(recipes, "_run", run)
    return found


def test_every_stage_gets_the_papers_numbers_what_is_shared_and_its_own(tmp_path):
    steps = {step.name: step for step in steps_of(read_recipe(written(tmp_path)))}
    assert list(steps) == NAMES
    paper = yaml.safe_load((ROOT / "examples/configs/stage1_connectors.yaml").read_text())
    stage1 = steps["connectors"].options
    assert stage1 == paper | {
        "dataset_name": "rows.jsonl", "logging_steps": 5, "llm": "an/llm", "vision_tower": "eyes",
        "learning_rate": 1e-3, "output_dir": str(tmp_path / "out/connectors"),
    }  # fmt: skip
    assert steps["experts/speech"].options["model_name_or_path"] == str(tmp_path / "out/connectors")
    assert steps["experts/speech"].options["lora_r"] == 8
    experts = [f"{name}={tmp_path / 'out/experts' / name / 'expert'}" for name in ("vision", "speech")]
    assert steps["moe"].options["experts"] == ["text=", *experts]
    asked = steps["evaluation"].command
    assert asked[3:5] == ["evaluate", str(tmp_path / "out/moe/merged")] and asked[-2:] == ["--max-new-tokens", "4"]
    assert "--other-media" in steps["evaluation_other_media"].command


def test_a_recipe_of_one_stage_is_one_step(tmp_path):
    recipe = read_recipe(written(tmp_path, experts=None, moe=None, evaluation=None))
    assert [step.name for step in steps_of(recipe)] == ["connectors"]
    asked = {"task": "short-answers", "data": "a.jsonl", "control": False}
    assert [step.name for step in steps_of({**recipe, "evaluation": asked})] == ["connectors", "evaluation"]
    launched = steps_of({**recipe, "launch": ["--num_processes", 2]})[0].command
    assert launched[1:5] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]


def test_an_expert_may_come_from_a_folder_or_be_the_plain_llm(tmp_path):
    recipe = read_recipe(written(tmp_path, moe={"experts": ["vision", "charts=a/folder", "plain="]}))
    moe = next(step for step in steps_of(recipe) if step.name == "moe")
    assert moe.options["experts"][1:] == ["charts=a/folder", "plain="]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_dir": None}, "has no 'output_dir'"),
        ({"parts": None}, "has no 'parts'"),
        ({"parts": {"vision_tower": "eyes"}}, "'connectors' has no `llm`"),
        ({"expert": {}}, "has the section 'expert'; did you mean 'experts'"),
        ({"connectors": {"learning_rat": 1}}, "has the option 'learning_rat'; did you mean 'learning_rate'"),
        ({"connectors": {"zzz": 1}}, "has the option 'zzz', which is unknown here"),
        ({"connectors": [1]}, "it must be options"),
        ({"shared": {}}, "'connectors' has no `dataset_name`"),
        ({"experts": {"vision": {}}}, "'experts/vision' has no `modalities`"),
        ({"experts": {"a/b": {"modalities": ["image"]}}}, "take letters, digits and underscores"),
        ({"experts": {"text": {"modalities": ["image"]}}}, "not `text`, which is the plain LLM's network"),
        ({"experts": {"vision": 5}}, "'experts/vision' is 5; it must be options"),
        ({"experts": {"vision": {"modalities": ["smell"]}}}, "'experts/vision': smell: no modality"),
        ({"moe": {"layers": "evne"}}, "'moe': `layers` is 'evne'; it must be one of all, even"),
        ({"moe": {"experts": "vision"}}, "`experts` of 'moe' is 'vision'; it must be a list"),
        ({"moe": {"experts": None}}, "`experts` of 'moe' is None; it must be a list"),
        ({"shared": {"dataset_name": "rows.jsonl", "dtype": "int3"}}, "'connectors': `dtype` is 'int3'"),
        ({"connectors": {"output_dir": "elsewhere"}}, "'output_dir', which the chain sets itself"),
        ({"evaluation": {"task": "nonsense", "data": "test.jsonl"}}, "nonsense"),
        ({"evaluation": {"task": "short-answers", "data": "nowhere.jsonl"}}, "'nowhere.jsonl' does not exist"),
        ({"evaluation": {"task": "short-answers", "data": "a.jsonl", "max_nwe_tokens": 8}}, "unrecognized arguments"),
        ({"evaluation": {"task": "short-answers", "data": "a.jsonl", "json": "b"}}, "which the chain sets itself"),
        ({"moe": {"experts": ["vison"]}}, "grows the expert 'vison', which no step trains"),
        ({"evaluation": {"task": "short-answers"}}, "'evaluation' has no `data`"),
        ({"launch": "--num_processes 2"}, "a list of options of `accelerate launch`"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_before_anything_runs(tmp_path, ran, changes, words, capsys):
    assert main(["train", str(written(tmp_path, **changes))]) == 1
    assert words in capsys.readouterr().err and not ran and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a: [", "just text", "\x00", "parts: {llm: a}\nparts: {llm: b}"])
def test_what_is_no_recipe_is_one_sentence(tmp_path, text, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "write one with `uni-moe init`" in said and said.count("\n") == 2


def test_what_is_finished_is_kept_and_the_same_command_goes_on(tmp_path, ran, monkeypatch):
    recipe, told = read_recipe(written(tmp_path)), []
    run, left = recipes._run, [2]

    def stopped(step):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        run(step)

    monkeypatch.setattr(recipes, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    assert ran == NAMES[:2]
    left[0] = 9
    assert run_recipe(recipe, say=told.append) == tmp_path / "out/moe/merged"
    assert ran == NAMES and told[0].startswith("[1/6] connectors: finished before")
    assert run_recipe(recipe) and ran == NAMES


def test_what_was_trained_with_other_options_is_not_taken_for_the_same(tmp_path, ran):
    run_recipe(read_recipe(written(tmp_path)))
    changed = read_recipe(written(tmp_path, moe={"layers": "all"}))
    with pytest.raises(
        ValueError, match="'moe' was begun with layers='even', and the recipe now has 'all'.*--again moe"
    ):
        run_recipe(changed)
    assert ran == NAMES
    (tmp_path / "out/moe/checkpoint-3").mkdir()
    run_recipe(changed, again="moe")
    assert ran[6:] == NAMES[3:] and not (tmp_path / "out/moe/checkpoint-3").exists()
    with pytest.raises(ValueError, match="There is no step 'fourth'"):
        run_recipe(changed, again="fourth")


def test_an_expert_that_is_added_runs_alone_and_the_mixture_must_be_grown_again(tmp_path, ran):
    run_recipe(read_recipe(written(tmp_path)))
    three = {"vision": {"modalities": ["image"]}, "speech": {"modalities": ["speech"], "lora_r": 8}}
    three["audio"] = {"modalities": ["audio"]}
    with pytest.raises(ValueError, match="'moe' was begun with experts="):
        run_recipe(read_recipe(written(tmp_path, experts=three)))
    run_recipe(read_recipe(written(tmp_path, experts=three)), again="moe")
    assert ran[6:] == ["experts/audio", *NAMES[3:]]


@pytest.mark.parametrize(
    ("removed", "again"),
    [
        ("evaluation.json", ["evaluation", "evaluation_other_media"]),
        ("moe/merged/config.json", NAMES[3:]),
        ("experts/speech/expert/adapter_config.json", ["experts/speech", *NAMES[3:]]),
        ("connectors", NAMES),
    ],
)
def test_what_was_removed_is_made_again_and_so_is_what_was_made_of_it(tmp_path, ran, removed, again):
    recipe = read_recipe(written(tmp_path))
    run_recipe(recipe)
    gone = tmp_path / "out" / removed
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    run_recipe(recipe)
    # A stage that lost its last file alone goes on as the same run, and what follows from it stays.
    assert ran[6:] == (again if removed in ("connectors", "evaluation.json") else again[:1])
    run_recipe(recipe)
    assert len(ran) == 6 + len(ran[6:])


def test_again_removes_nothing_where_another_step_has_changed(tmp_path, ran):
    run_recipe(read_recipe(written(tmp_path)))
    changed = read_recipe(written(tmp_path, connectors={"learning_rate": 2e-3}, moe={"layers": "all"}))
    with pytest.raises(ValueError, match="'connectors' was begun with learning_rate=0.001"):
        run_recipe(changed, again="moe")
    assert (tmp_path / "out/moe/merged/config.json").is_file() and (tmp_path / "out/evaluation.json").is_file()
    fewer = written(tmp_path, evaluation={"task": "short-answers", "data": "test.jsonl", "max_new_tokens": 2})
    run_recipe(read_recipe(fewer), again="evaluation")
    assert ran[6:] == NAMES[4:]


def test_another_spelling_of_a_path_is_no_change(tmp_path, ran, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    run_recipe(read_recipe(written(tmp_path)))
    other = written(tmp_path, output_dir="out", shared={"dataset_name": "./rows.jsonl", "logging_steps": 5})
    run_recipe(read_recipe(other))
    assert ran == NAMES


@pytest.mark.parametrize("text", ['{"conn', "[]", '{"connectors": 5}'])
def test_a_torn_note_of_progress_is_said(tmp_path, ran, text):
    run_recipe(read_recipe(written(tmp_path)))
    (tmp_path / "out/progress.json").write_text(text)
    with pytest.raises(ValueError, match="cannot be read.*remove it to begin again"):
        run_recipe(read_recipe(written(tmp_path)))


def test_a_dry_run_prints_commands_that_can_be_typed(tmp_path, ran, capsys):
    assert main(["train", str(written(tmp_path)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and not ran
    assert all(f"train_stage{n}" in line for n, line in zip((1, 2, 2, 3), lines, strict=False))


def test_a_step_that_fails_ends_the_chain_with_one_sentence(tmp_path):
    """The real first stage: its parts do not exist."""
    file = written(tmp_path, shared={"dataset_name": str(tmp_path / "rows.jsonl")}, evaluation=None)
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    done = subprocess.run(
        [sys.executable, "-m", "uni_moe_hf.cli", "train", str(file)],
        capture_output=True, text=True, timeout=120, env=child_environment(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'connectors' failed with exit code 1; see its output above" in done.stderr
    assert json.loads((tmp_path / "out/progress.json").read_text())["connectors"].get("seconds") is None


@pytest.mark.slow
def test_the_chain_trains_is_killed_goes_on_and_its_model_loads(tmp_path):
    rows = write_parts(tmp_path)
    # Another row's media stand in for the control, so there must be two of each.
    Image.fromarray(picture(1)).save(tmp_path / "media/b.png")
    soundfile.write(tmp_path / "media/b.wav", tone(pitch=700), 16000)
    lines = [line for line in rows.read_text().splitlines() if '"type": "audio"' not in line]
    lines += [line.replace("media/a", "media/b") for line in lines]
    rows.write_text("\n".join(lines))
    tiny = {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    tiny |= {"max_steps": 6, "save_steps": 2, "report_to": "none", "live_figures": True, "logging_steps": 1}
    file = written(
        tmp_path,
        parts={"llm": str(tmp_path / "language_model"), "num_speech_query_tokens": 3}
        | {f"{name}_tower": str(tmp_path / f"{name}_tower") for name in ("vision", "speech")},
        shared={"dataset_name": str(rows), "feature_cache": str(tmp_path / "features"), "fill_feature_cache": True}
        | tiny,
        evaluation={"task": "short-answers", "data": str(rows), "max_new_tokens": 2},
    )
    command = [sys.executable, "-m", "uni_moe_hf.cli", "train", str(file)]
    environment = child_environment(PYTHONPATH=str(ROOT))
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while not list((tmp_path / "out/connectors").glob("checkpoint-4/digests.json")) and first.poll() is None:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 130
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[6/6] evaluation_other_media" in done.stdout
    model = AutoModel.from_pretrained(tmp_path / "out/moe/merged", trust_remote_code=True)
    assert model.config.text_config.expert_names == ["text", "vision", "speech"]
    for stage, figures in (("connectors", ["losses"]), ("moe", ["losses", "routing"])):
        assert sorted(file.stem for file in (tmp_path / "out" / stage / "figures").glob("*")) == figures
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert again.stdout.count("finished before") == 6
