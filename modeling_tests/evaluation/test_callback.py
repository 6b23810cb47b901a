"""Questions asked while a model is trained, and losses of an evaluation by modality."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from tiny_training import make_own_trainer, rows, rows_apart, write_media
from transformers import EarlyStoppingCallback

from uni_moe_hf import GenerationCallback
from uni_moe_hf.evaluation.tasks import Task


SHORT = Task("short", metrics=("exact_match",), decoding={"max_new_tokens": 3})


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"), 12)


def trainer_of(media, folder, **settings):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4} | settings
    held = Dataset.from_list(rows(6), on_mixed_types="use_json")
    return make_own_trainer(media, folder, tiny_model(), "moe", own={"eval_dataset": held}, **settings)


def logged(trainer, name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def test_a_tasks_figures_are_logged_every_so_many_steps(media, tmp_path):
    trainer = trainer_of(media, tmp_path, eval_strategy="no")
    GenerationCallback.add_to(trainer, "short-answers,2")
    trainer.train()
    assert [step for step, _ in logged(trainer, "eval_exact_match")] == [2, 4]
    assert [step for step, _ in logged(trainer, "eval_exact_match/image")] == [2, 4]
    assert [step for step, _ in logged(trainer, "eval_loss")] == [2, 4]


def test_the_loss_of_an_evaluation_is_told_by_modality(media, tmp_path):
    trainer = trainer_of(media, tmp_path)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("eval_loss/")}
    kinds = ("image", "speech", "audio", "video", "text", "image+audio+speech")
    assert names == {f"eval_loss/{kind}" for kind in kinds}
    training = {name for entry in trainer.state.log_history for name in entry if name.startswith("loss/")}
    assert training <= {name.removeprefix("eval_") for name in names}
    alone = trainer.evaluate()  # also outside of training
    # Answers have two or three tokens each: the mean over tokens is that of all.
    assert min(alone[name] for name in names) <= alone["eval_loss"] <= max(alone[name] for name in names)


def test_the_best_checkpoint_may_be_known_by_a_tasks_figure(media, tmp_path):
    trainer = trainer_of(
        media,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_own_loss",
        greater_is_better=False,
    )
    held = [row for row in rows_apart(12) if len(row["messages"][0]["content"]) == 2]
    trainer.add_callback(GenerationCallback(trainer, "preference", every=100, rows=held))
    trainer.train()
    losses = logged(trainer, "eval_own_loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4]  # at every evaluation, whatever `every` says
    best = min(losses, key=lambda pair: pair[1])
    assert trainer.state.best_global_step == best[0] and trainer.state.best_metric == best[1]


def test_an_evaluation_between_saves_is_refused_where_the_best_is_loaded(media, tmp_path):
    """Its step would be taken for the best one's, and have no checkpoint."""
    best = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(media, tmp_path, **best)
    with pytest.raises(ValueError, match="1 steps are no multiple of `eval_steps=2`"):
        GenerationCallback(trainer, SHORT, every=1)
    trainer.add_callback(GenerationCallback(trainer, SHORT, every=4))
    trainer.train()
    assert [step for step, _ in logged(trainer, "eval_loss")] == [2, 4]
    assert [step for step, _ in logged(trainer, "eval_exact_match")] == [4]


def test_early_stopping_sees_the_figures(media, tmp_path):
    stops = EarlyStoppingCallback(early_stopping_patience=1)
    best = {"metric_for_best_model": "eval_exact_match", "greater_is_better": True, "max_steps": 12}
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = trainer_of(media, tmp_path, **best, **saved, learning_rate=1e-9)
    trainer.add_callback(stops)
    trainer.add_callback(GenerationCallback(trainer, SHORT, every=1))
    trainer.train()
    assert trainer.state.global_step == 2  # the figure stays 0


def test_side_figures_may_choose_the_best_in_their_own_direction(media, tmp_path):
    choice = Task("choice", metrics=("choice",), prompt="{question} {options}", decoding={"max_new_tokens": 2})
    held = [{"question": "what", "options": ["a", "b"], "answer": "A"}] * 2
    trainer = trainer_of(media, tmp_path, metric_for_best_model="choice_unparsed", greater_is_better=False)
    assert GenerationCallback(trainer, choice, 1, rows=held).chooses
    trainer = trainer_of(media, tmp_path, metric_for_best_model="eval_choice_unparsed", greater_is_better=True)
    with pytest.raises(ValueError, match="less is better; set `greater_is_better=False`"):
        GenerationCallback(trainer, choice, 1, rows=held)


def test_training_goes_on_as_if_nothing_had_been_asked(media, tmp_path):
    plain = trainer_of(media, tmp_path / "plain")
    plain.train()
    asked = trainer_of(media, tmp_path / "asked")
    sampled = Task("sampled", metrics=("exact_match",), decoding={"max_new_tokens": 3, "do_sample": True})
    asked.add_callback(GenerationCallback(asked, sampled, every=1))
    asked.train()
    names = [name for entry in plain.state.log_history for name in entry if name.startswith(("load/", "loss"))]
    assert any(name.startswith("load/") for name in names)
    for name in names:
        assert logged(asked, name) == logged(plain, name), name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes do not share a GPU")
def test_two_processes_share_the_questions_and_know_all_figures(media, tmp_path):
    """DDP on a CPU; of a model that does not learn, the figures of one process."""
    script = Path(__file__).parent / "asking.py"
    found = {}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--master_port=29517"]
        subprocess.run(
            [*command, str(script), str(media), str(tmp_path / str(count))],
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        found[count] = [json.loads(file.read_text()) for file in sorted((tmp_path / str(count)).glob("rank*.json"))]
    assert len(found[2]) == 2 and found[2][0] == found[2][1]
    for name, value in found[1][0].items():
        assert found[2][0][name] == pytest.approx(value, abs=1e-4), name


def test_wishes_that_cannot_be_met_are_one_sentence(media, tmp_path):
    trainer = trainer_of(media, tmp_path)
    for wanted in ("short-answers", "short-answers,often", ",5"):
        with pytest.raises(ValueError, match="it must be a task and a number of steps"):
            GenerationCallback.add_to(trainer, wanted)
    trainer.args.metric_for_best_model = "eval_exact_match/image"
    with pytest.raises(ValueError, match="exact_match` is a task's figure; ask it with `eval_generate`"):
        GenerationCallback.add_to(trainer, None)
    trainer.args.metric_for_best_model = None
    with pytest.raises(ValueError, match="Questions are asked every 0 steps"):
        GenerationCallback.add_to(trainer, "short-answers,0")
    with pytest.raises(ValueError, match="scored by a judge, which is not asked while training"):
        GenerationCallback(trainer, "mm-vet", 1)
    with pytest.raises(ValueError, match="There is no task 'nothing'"):
        GenerationCallback(trainer, "nothing", 1)
    with pytest.raises(ValueError, match="is about image, and it holds no image"):
        GenerationCallback(trainer, "a-okvqa", 1, rows=[{"question": "what", "answer": "x"}])
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="no rows to ask about: give an `eval_dataset`"):
        GenerationCallback(trainer, SHORT, 1)
    trainer = trainer_of(media, tmp_path, metric_for_best_model="word_error_rate", greater_is_better=True)
    with pytest.raises(ValueError, match="less is better; set `greater_is_better=False`"):
        GenerationCallback(trainer, Task("heard", metrics=("word_error_rate",)), 1)


def test_rows_are_held_out_by_number_and_never_trained_on(media, tmp_path):
    from uni_moe_hf import StageArguments, sft_config

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{index}", "answer": "x"}) for index in range(20)))
    config = sft_config("moe", tmp_path / "out", eval_strategy="steps", eval_steps=1)
    wanted = StageArguments(dataset_name=str(file), eval_rows=5)
    train, held = wanted.splits(config)
    asked = [[row["question"] for row in part] for part in (train, held)]
    assert len(asked[1]) == 5 and sorted(asked[0] + asked[1]) == sorted(f"q{index}" for index in range(20))
    assert [row["question"] for row in wanted.splits(config)[1]] == asked[1]
    assert asked[1] != [f"q{index}" for index in range(5)]
    stream = StageArguments(dataset_name=str(file), eval_rows=5, dataset_streaming=True)
    train, held = stream.splits(config)
    found = [[row["question"] for row in part] for part in (train, held)]
    assert len(found[1]) == 5 and sorted(found[0] + found[1]) == sorted(asked[0] + asked[1])
    for count in (0, 20):
        with pytest.raises(ValueError, match=f"`eval_rows={count}` cannot be held out of 20 rows; give 1 to 19"):
            StageArguments(dataset_name=str(file), eval_rows=count).splits(config)
    with pytest.raises(ValueError, match="`eval_rows` is given, but nothing is evaluated; add `--eval_strategy`"):
        wanted.splits(sft_config("moe", tmp_path / "out"))
    asking = StageArguments(dataset_name=str(file), eval_rows=5, eval_generate="short-answers,5")
    assert len(asking.splits(sft_config("moe", tmp_path / "out"))[1]) == 5
    with pytest.raises(ValueError, match="both say what to evaluate on"):
        StageArguments(dataset_name=str(file), eval_rows=5, dataset_test_split="dev").splits(config)
