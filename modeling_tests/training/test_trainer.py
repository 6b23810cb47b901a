"""`UniMoESFTTrainer`: rates by part, grouped batches, logs that add up, checkpoints like the plain trainer's."""

import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from peft import AutoPeftModelForCausalLM, PeftModel
from PIL import Image
from test_stages import trainable
from tiny import (
    DENSE,
    MIXED,
    MODALITIES,
    ROOT,
    ROUNDING,
    assert_logits_equal,
    child_environment,
    make_inputs,
    picture,
    tiny_model,
    tiny_processor,
    user,
)
from tiny_training import make_own_trainer, rows, write_media
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from uni_moe_hf import (
    UniMoEDataCollator,
    UniMoEForConditionalGeneration,
    UniMoESFTTrainer,
    export_expert,
    last_complete_checkpoint,
    moe_lora_config,
    prepare_stage,
    record_routing,
    row_to_messages,
    sft_config,
)
from uni_moe_hf.mixtures.expert_adapters import read_expert
from uni_moe_hf.training.resuming import only_run_in
from uni_moe_hf.training.trainer import ModalityGroupedSampler


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture
def trainer(media, tmp_path):
    return partial(make_own_trainer, media, tmp_path)


def test_stage_three_has_a_config_of_its_own_and_the_adapter_names_its_stage(tmp_path, trainer):
    model = tiny_model()
    config = moe_lora_config(model, lora_dropout=0.0)
    assert config.auto_mapping == {"stage": "moe"} and config.r == 8
    sft = trainer(tiny_model(), "moe", save_strategy="steps", save_steps=2)
    sft.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())
    assert saved["auto_mapping"] == {"stage": "moe"}
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    with pytest.raises(ValueError, match="is an adapter of stage 'moe', not of stage 'experts'"):
        read_expert("x", tmp_path / "checkpoint-4", tiny_model(DENSE).config.text_config)


@pytest.mark.parametrize("stage", ["connectors", "experts"])
def test_a_stage_after_the_wrong_one_is_refused(stage):
    model = tiny_model(DENSE, stage="experts")
    with pytest.raises(ValueError, match=rf"Stage '{stage}' follows 'connectors', but this model has had 'experts'"):
        prepare_stage(model, stage)
    fresh = tiny_model(DENSE, stage="connectors")
    prepare_stage(fresh, "experts")
    prepare_stage(fresh, "experts", ["speech"])  # prepared anew before any training


def test_parts_get_their_own_learning_rates(trainer):
    rates = {"audio connector": 3e-5, "expert LoRA": 4e-4}
    sft = trainer(tiny_model(), "moe", own={"learning_rates": rates})
    sft.create_optimizer()
    found = {}
    names = {id(parameter): name for name, parameter in sft.model.named_parameters()}
    for group in sft.optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["lr"]
    assert found.keys() == {name for name, parameter in sft.model.named_parameters() if parameter.requires_grad}
    for name, rate in found.items():
        wanted = 3e-5 if "audio_connector" in name else 4e-4 if ".experts.lora" in name else 1e-2
        assert rate == wanted, name


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"ears": 1.0}, r"no parts \['ears'\]"),
        ({"dense FFN": 1.0}, r"\['dense FFN'\] have learning rates but nothing"),
    ],
)
def test_learning_rates_of_nothing_are_refused(trainer, rates, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny_model(), "moe", own={"learning_rates": rates}).create_optimizer()


def test_settings_that_would_break_media_are_refused(trainer, tmp_path):
    with pytest.raises(ValueError, match="needs `max_length=None`"):
        sft_config("moe", tmp_path, max_length=100)
    with pytest.raises(ValueError, match="no stage 'fourth'"):
        sft_config("fourth", tmp_path)
    sft = trainer(tiny_model(), "moe")
    sft.args.logging_nan_inf_filter = True
    with pytest.raises(ValueError, match="needs `logging_nan_inf_filter=False`"):
        UniMoESFTTrainer(
            model=tiny_model(),
            args=sft.args,
            train_dataset=sft.train_dataset,
            processing_class=sft.processing_class,
            data_collator=sft.data_collator,
        )


class Keep(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def without_dropout(model) -> None:
    for module in model.modules():
        for name in ("p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_losses_by_modality_and_loads_add_up_to_what_was_trained(trainer, media, coefficient):
    keep, names = Keep(), {"expert_names": ["a", "b", "c", "d"]}
    sft = trainer(
        tiny_model({**names, "router_aux_loss_coef": coefficient}),
        "moe",
        data=rows(6),
        router_aux_loss_coef=coefficient,
        max_steps=1,
        per_device_train_batch_size=6,
    )
    sft.add_callback(keep)
    without_dropout(sft.model)  # the Q-Former's, which is frozen but in training mode as in the original
    sft.train()
    logs, reference = keep.logs[0], tiny_model(names)
    # By hand: each row alone through the untrained model, which the first step saw.
    collate = UniMoEDataCollator(tiny_processor(reference.config), media_root=media)
    sums: dict[str, list[float]] = {}
    with record_routing(reference) as routing, torch.no_grad():
        for row in rows(6):
            batch = collate([row])
            kinds = [m for m in MODALITIES if (batch["input_ids"] == getattr(reference.config, f"{m}_token_id")).any()]
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            entry = sums.setdefault("+".join(kinds) or "text", [0.0, 0])
            entry[0] += reference(**batch).loss.item() * tokens
            entry[1] += tokens
    found = {name.removeprefix("loss/"): value for name, value in logs.items() if name.startswith("loss/")}
    assert found.keys() == sums.keys() and len(sums) > 3
    for name, (loss, tokens) in sums.items():
        assert found[name] == pytest.approx(loss / tokens, rel=1e-4)
    total = sum(loss for loss, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
    if not coefficient:
        assert logs["loss"] == pytest.approx(total, rel=1e-4)
    counts = routing.report().counts.sum(dim=1).double()
    share = (counts / counts.sum(dim=1, keepdim=True)).mean(dim=0)
    for index, name in enumerate("abcd"):
        assert logs[f"load/{name}"] == pytest.approx(share[index].item(), rel=1e-5)
    assert logs["load/max_over_min"] == pytest.approx((counts.amax(1) / counts.amin(1).clamp(min=1)).max().item())
    assert 0 < logs["specialisation/mean"] <= logs["specialisation/max"] <= 1


@pytest.mark.parametrize("stage", ["connectors", "experts", "moe"])
def test_checkpoints_of_both_trainers_are_interchangeable(stage, trainer, tmp_path):
    def run(folder, kind, resume=None, **settings):
        model = tiny_model(None if stage == "moe" else DENSE)
        sft = trainer(model, stage, kind, output_dir=str(folder), save_strategy="steps", save_steps=2, **settings)
        sft.train(resume_from_checkpoint=resume)
        return sft.model.state_dict()

    def output(kind):
        return tmp_path / kind.__name__

    whole = run(output(SFTTrainer), SFTTrainer)
    ours = run(output(UniMoESFTTrainer), UniMoESFTTrainer)
    for name, tensor in whole.items():
        assert torch.equal(tensor, ours[name]), name
    for first, second in ((SFTTrainer, UniMoESFTTrainer), (UniMoESFTTrainer, SFTTrainer)):
        resumed = run(tmp_path / "again" / second.__name__, second, str(output(first) / "checkpoint-2"))
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name


def test_a_loss_that_is_no_number_stops_and_names_the_rows(trainer):
    model = tiny_model(DENSE)
    with torch.no_grad():
        model.model.vision_connector.projector[0].weight[0, 0] = float("nan")
    data = [{**row, "_row": number, "_source": "rows.jsonl"} for number, row in enumerate(rows(1) * 2, start=7)]
    sft = trainer(model, "connectors", data=data)
    before = {name: tensor.clone() for name, tensor in sft.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step 1 is no number; the batch was Row [78] of 'rows.jsonl'; Row [78] of"):
        sft.train()
    for name, tensor in sft.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], equal_nan=True, atol=0, rtol=0)


def kinds_of(data: Dataset, order: list[int]) -> list[tuple]:
    from uni_moe_hf.training.rows import row_modalities

    return [row_modalities(data[index])[0] for index in order]


@pytest.mark.parametrize("stage", ["connectors", "moe"])
def test_training_goes_on_over_batches_of_which_every_row_is_skipped(trainer, stage):
    broken = {"messages": [*user({"type": "image", "path": "nowhere.png"}), {"role": "assistant", "content": "x"}]}
    model = tiny_model(DENSE if stage == "connectors" else None)
    sft = trainer(model, stage, data=[broken, *rows(1), broken, broken], per_device_train_batch_size=1)
    sft.data_collator.skip_bad_rows = True
    sft.train()
    assert sft.state.global_step == 4
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert max(entry.get("rows_skipped", 0) for entry in sft.state.log_history) == 3
    assert sorted(losses)[:3] == [0.0] * 3 and all(torch.isfinite(p).all() for p in sft.model.parameters())


def test_evaluation_does_not_change_what_is_logged_of_training(trainer):
    loads = []
    data = Dataset.from_list(rows(), on_mixed_types="use_json")
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model = tiny_model()
        settings |= {"peft_config": prepare_stage(model, "moe", lora_dropout=0.0)}
        without_dropout(model)  # evaluation draws random numbers that it would have had
        sft = trainer(model, "moe", data=data, own={"eval_dataset": data.select([2, 3])}, **settings)
        sft.train()
        loads.append([{k: v for k, v in each.items() if "load/" in k} for each in sft.state.log_history])
    assert [each for each in loads[0] if each] == [each for each in loads[1] if each]


@pytest.mark.parametrize("own", [{}, {"learning_rates": {"vision connector": "3e-4"}}], ids=["plain", "text"])
def test_rates_may_be_text_and_a_text_experts_checkpoints_are_interchangeable(trainer, own, tmp_path):
    """YAML reads 3e-4 as text; an expert without projectors has a group without parameters."""
    model = tiny_model(DENSE)
    if own:
        sft = trainer(model, "experts", own=own)
        sft.create_optimizer()
        assert {group["lr"] for group in sft.optimizer.param_groups} == {1e-2, 3e-4}
        return
    saving = {"save_strategy": "steps", "save_steps": 2}
    for first, second in ((SFTTrainer, UniMoESFTTrainer), (UniMoESFTTrainer, SFTTrainer)):
        folder = tmp_path / first.__name__
        runs = []
        for kind in (first, second):
            model = tiny_model(DENSE)
            peft_config = prepare_stage(model, "experts", [])
            runs.append(trainer(model, "experts", kind, output_dir=folder, peft_config=peft_config, **saving))
        runs[0].train()
        shutil.rmtree(folder / "checkpoint-4")
        runs[1].train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        for (name, one), (_, other) in zip(
            runs[0].model.named_parameters(), runs[1].model.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name


def test_data_and_settings_that_cannot_be_trained_on_are_refused(trainer, tmp_path):
    stream = Dataset.from_list(rows(), on_mixed_types="use_json").to_iterable_dataset()
    with pytest.raises(ValueError, match="needs a whole data set; a stream"):
        trainer(tiny_model(), "moe", data=stream, own={"group_by_modality": True})
    with pytest.raises(ValueError, match="hold no rows"):
        trainer(tiny_model(), "moe", data=Dataset.from_list([]))
    args = SFTConfig(str(tmp_path), use_cpu=True, remove_unused_columns=False, logging_nan_inf_filter=False)
    with pytest.raises(ValueError, match="'skip_prepare_dataset': True"):
        UniMoESFTTrainer(model=tiny_model(), args=args, train_dataset=stream)
    settings = {"split_batches": True, "dispatch_batches": False}
    more = sft_config("moe", tmp_path, use_cpu=True, accelerator_config=settings)
    assert more.accelerator_config.split_batches and more.accelerator_config.dispatch_batches is False


def test_rows_that_cannot_be_read_are_grouped_together_and_named_by_the_collator():
    bad = {"conversations": [{"from": "human", "value": "<image><image>"}], "image": ["0.png"]}
    data = [*rows(3), bad, {"messages": [{"role": "user", "content": None}]}]
    order = list(ModalityGroupedSampler(data, 2))
    assert sorted(order) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [2, 4, 7])
def test_grouped_batches_hold_one_kind_and_drop_no_row(size):
    data = Dataset.from_list(rows(50), on_mixed_types="use_json")
    sampler = ModalityGroupedSampler(data, size, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and len(sampler) == 50
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    kinds = kinds_of(data, first)
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    whole = sum(count // size for count in counts.values())
    steps = [kinds[start : start + size] for start in range(0, 50, size)]
    assert all(len(set(step)) == 1 for step in steps[:whole])


def test_training_in_grouped_batches_sees_every_row(trainer):
    seen = []
    data = [{**row, "_row": number, "_source": "f"} for number, row in enumerate(rows(12))]
    sft = trainer(tiny_model(), "moe", data=data, own={"group_by_modality": True}, max_steps=-1, num_train_epochs=1)
    inner = sft.data_collator
    sft.data_collator = lambda batch: seen.extend(row["_row"] for row in batch) or inner(batch)
    sft.train()
    assert sorted(seen) == list(range(12))


TEARS = {
    "whole": lambda f: None,
    "no state": lambda f: (f / "trainer_state.json").unlink(),
    "half a state": lambda f: (f / "trainer_state.json").write_text((f / "trainer_state.json").read_text()[:50]),
    "state of another step": lambda f: (f / "trainer_state.json").write_text('{"global_step": 2}'),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "half the weights": lambda f: cut(f / "adapter_model.safetensors"),
    "empty weights": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "half an optimiser": lambda f: cut(f / "optimizer.pt"),
    "no optimiser": lambda f: (f / "optimizer.pt").unlink(),
    "no scheduler": lambda f: (f / "scheduler.pt").unlink(),
    "no random state": lambda f: (f / "rng_state.pth").unlink(),
    "half a config": lambda f: (f / "adapter_config.json").write_text("{"),
    "damaged optimiser": lambda f: flip(f / "optimizer.pt"),
    "flipped weights": lambda f: flip(f / "adapter_model.safetensors"),
    "zeroed weights": lambda f: zero(f / "adapter_model.safetensors"),
    "a state of one field": lambda f: (f / "trainer_state.json").write_text('{"global_step": 4}'),
    "a state nested without end": lambda f: (f / "trainer_state.json").write_text("[" * 100_000),
    "another config": lambda f: (f / "adapter_config.json").write_text("{}"),
}


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file) -> None:
    """The header stays whole."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:begin] + bytes(len(content) - begin))


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def saved(media, tmp_path_factory):
    """A run's folder with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    make_own_trainer(media, folder, tiny_model(), "moe", save_strategy="steps", save_steps=2).train()
    return folder


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_passed_over(tear, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    TEARS[tear](tmp_path / "run" / "checkpoint-4")
    step = 4 if tear == "whole" else 2
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{step}")


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_where_all_checkpoints_are_torn_nothing_starts_over(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        cut(folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"None of the 2 checkpoints in .* \(the last: optimizer\.pt .*remove them"):
        last_complete_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("a checkpoint of DeepSpeed", lambda f: [(f / "global_step4").mkdir(), (f / "optimizer.pt").unlink()]),
        (
            "a sharded checkpoint of FSDP",
            lambda f: [(f / "pytorch_model_fsdp_0").mkdir(), (f / "optimizer_0").mkdir()],
        ),
        ("weights alone", lambda f: [(f / n).unlink() for n in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]),
    ],
)
def test_layouts_that_cannot_be_judged_are_named(layout, change, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    change(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ValueError, match=rf"checkpoint-4' holds {layout}.*name it in `resume_from_checkpoint`"):
        last_complete_checkpoint(tmp_path / "run")


def test_files_may_be_read_by_whom_the_umask_allows(trainer, tmp_path):
    old = os.umask(0o022)
    try:
        sft = trainer(tiny_model(DENSE), "experts", save_strategy="steps", save_steps=4)
        sft.train()
        sft.save_model(str(tmp_path / "end"))
        export_expert(tmp_path / "end", tmp_path / "expert")
        tiny_model().save_pretrained(tmp_path / "model")
    finally:
        os.umask(old)
    for folder in ("checkpoint-4", "end", "expert", "model"):
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / folder).iterdir()}
        assert set(modes.values()) == {"0o644"}, modes


def test_two_runs_in_one_folder_are_one_too_many(trainer, tmp_path):
    waiting = "from uni_moe_hf.training.resuming import only_run_in; import sys\n"
    waiting += "with only_run_in(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", waiting, str(tmp_path)]
    environment = child_environment(PYTHONPATH=str(ROOT))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as other:
        assert other.stdout.readline() == "in\n"
        sft = trainer(tiny_model(), "moe", max_steps=1)
        with pytest.raises(ValueError, match=f"Another run is training in '{tmp_path}'"):
            sft.train()
        other.kill()
    sft.train()  # a run that was killed holds nothing
    with only_run_in(tmp_path), only_run_in(tmp_path):
        assert sft.state.global_step == 1


@pytest.mark.parametrize("refused", [1, 2])
def test_a_lock_that_cannot_stand_beside_the_folder_stands_inside_or_nowhere(refused, tmp_path, monkeypatch, caplog):
    acquire, asked = FileLock.acquire, []

    def refusing(lock, *args, **kwargs):
        asked.append(Path(lock.lock_file))
        if len(asked) <= refused:
            raise PermissionError(13, "Permission denied")
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", refusing)
    with only_run_in(tmp_path / "run"):
        assert asked == [tmp_path / ".run.lock", tmp_path / "run/.lock"]
    assert ("cannot be locked" in caplog.text) == (refused == 2)


# ---- whose collator ----


def beside() -> list[dict]:
    """Rows in TRL's own form."""
    row = {"messages": [*user({"type": "image"}, "what is it"), {"role": "assistant", "content": [ANSWER]}]}
    return [{**row, "images": [Image.fromarray(picture(index))]} for index in range(4)]


ANSWER = {"type": "text", "text": "a bird"}


def first_loss(model, collator, media, tmp_path, peft_config=None, **settings) -> float:
    args = sft_config(
        "moe", tmp_path, use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=2, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(beside()),
        processing_class=tiny_processor(model.config),
        data_collator=collator,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


class Everything:
    """Labels of all tokens but the padding, as TRL's own collator makes them; placeholders hidden, or not."""

    def __init__(self, processor, hidden: bool):
        self.processor, self.hidden = processor, hidden

    def __call__(self, rows: list) -> dict:
        chats = [row_to_messages(row) for row in rows]
        settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        more = {"padding": True, "add_special_tokens": False}  # TRL leaves `<s>` to templates
        batch = dict(self.processor.apply_chat_template(chats, processor_kwargs=more, **settings))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"] = labels.masked_fill(labels == self.processor.image_token_id, -100) if self.hidden else labels
        return batch


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trls_own_collator_learns_no_placeholder(media, tmp_path, with_lora, smoothing):
    """Its losses are those of a collator that hides them: 1e-4, as the two pad on other sides."""
    losses = []
    for own in (True, False):
        model = tiny_model()
        lora = moe_lora_config(model, lora_dropout=0.0) if with_lora else None
        collator = None if own else Everything(tiny_processor(model.config), hidden=True)
        losses.append(first_loss(model, collator, media, tmp_path, lora, label_smoothing_factor=smoothing))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_model_learns_no_placeholder_whatever_the_labels_say():
    model, processor = tiny_model(), tiny_processor()
    everything = Everything(processor, hidden=False)(beside()[:2])
    hidden = Everything(processor, hidden=True)(beside()[:2])
    expected = model(**hidden).loss
    for forward in (model, model.forward):
        assert torch.equal(forward(**everything).loss, expected)
    behind = {**everything, "labels": everything["labels"].masked_fill(everything["labels"] >= 380, 5000)}
    assert torch.equal(model(**behind).loss, expected)


def test_our_trainer_brings_our_collator(media, tmp_path):
    model = tiny_model()
    args = sft_config("moe", tmp_path, use_cpu=True, bf16=False, max_steps=1, report_to="none", disable_tqdm=True)
    parts = {"model": model, "args": args, "train_dataset": Dataset.from_list(beside())}
    parts["peft_config"] = moe_lora_config(model)
    trainer = UniMoESFTTrainer(**parts, processing_class=tiny_processor(model.config))
    assert isinstance(trainer.data_collator, UniMoEDataCollator)
    trainer.train()
    with pytest.raises(ValueError, match="Pass the model's processor"):
        UniMoESFTTrainer(**parts, processing_class=tiny_processor(model.config).tokenizer)


@pytest.mark.parametrize("before", [0, 1], ids=["first", "second"])
def test_a_full_disk_is_one_sentence_that_names_the_last_whole_checkpoint(before, trainer, tmp_path):
    """A limit on the size of files stands in for the disk: the same writes fail, with another reason."""
    sft = trainer(tiny_model(), "moe", save_strategy="steps", save_steps=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > 2 * before:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    sft.add_callback(FullDisk())
    left = f"resume from '{tmp_path}/checkpoint-2'" if before else "start again"
    try:
        with pytest.raises(
            OSError, match=rf"step {2 * before + 2} could not be written: .*GB left\). Make room, then {left}"
        ):
            sft.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_unwritable_folder_is_refused_before_anything_is_trained(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"'{tmp_path}' cannot be written to"):
        trainer(tiny_model(), "moe")


def test_an_adapter_loads_with_its_base_by_its_own_name(trainer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "base")
    sft = trainer(model, "moe", max_steps=1, output_dir=tmp_path / "run")
    sft.train()
    sft.save_model(str(tmp_path / "adapter"))
    loaded, inputs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), make_inputs(model.config, MIXED)
    with torch.no_grad():
        # PEFT gives the table as many rows as the tokenizer beside the adapter has words.
        found, expected = loaded.eval()(**inputs).logits, sft.model.eval()(**inputs).logits
        assert_logits_equal(found[..., : expected.shape[-1]], expected)


def test_an_adapter_of_another_model_is_refused_by_peft(saved):
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_model({"hidden_size": 64}), saved / "checkpoint-4")


def test_what_is_trained_is_what_the_stage_names(trainer):
    plain, ours = (trainer(tiny_model(), "moe", kind) for kind in (SFTTrainer, UniMoESFTTrainer))
    assert trainable(plain.model) == trainable(ours.model)


@pytest.mark.parametrize("stage", ["connectors", "moe"])
def test_accumulated_gradients_are_those_of_the_large_batch(stage, trainer, tmp_path):
    """Rows have answers of unequal length, so micro-batches have unequal numbers of tokens. Plain SGD, one step."""
    data = rows(8)
    for index, row in enumerate(data):
        row["messages"][1]["content"][0]["text"] = "a bird " * (1 + index)

    def run(batch_size, accumulate):
        sft = trainer(
            tiny_model(None if stage == "moe" else DENSE),
            stage,
            data=data,
            output_dir=str(tmp_path / str(batch_size)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            router_aux_loss_coef=0.0,
        )
        for module in sft.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        connector = next(module for name, module in sft.model.named_modules() if name.endswith("audio_connector"))
        connector.qformer.register_forward_pre_hook(lambda module, _: module.eval() and None)  # dropout by number
        sft.train()
        return sft.model.state_dict()

    whole = run(8, 1)
    for size in (4, 2, 1):
        for name, tensor in run(size, 8 // size).items():
            torch.testing.assert_close(tensor, whole[name], **ROUNDING, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_that_trained_nothing_does_not_end_as_if_it_had(trainer):
    hopeless = [{"messages": [*user({"type": "image", "path": "no.png"}), {"role": "assistant", "content": "x"}]}]
    sft = trainer(tiny_model(), "moe", data=hopeless * 4, max_steps=2)
    sft.data_collator.skip_bad_rows = True
    with pytest.raises(ValueError, match="Nothing was trained: no row of the 2 batches could be used"):
        sft.train()


@pytest.mark.parametrize(
    "setting", [{"completion_only_loss": False}, {"assistant_only_loss": True}, {"packing": True}]
)
def test_settings_of_who_reads_rows_are_refused_where_nobody_obeys_them(trainer, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` does nothing here"):
        trainer(tiny_model(), "moe", **setting)
