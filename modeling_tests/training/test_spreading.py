"""Stage 3 with experts spread over processes: the numbers of one process, checkpoints that one process reads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import EXACT, ROOT, TESTS, child_environment, make_inputs, tiny_model
from tiny_training import make_own_trainer, write_media

from uni_moe_hf import last_complete_checkpoint, prepare_stage, spread
from uni_moe_hf.training.trainer import ModalityGroupedSampler


HERE = Path(__file__).parent
OWN = {"shared_expert_base": False}


def run(processes: int, folder: Path, media: Path, **settings) -> dict[str, torch.Tensor]:
    """What was trained."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "spread_training.py"), json.dumps({"folder": str(folder), "media": str(media), **settings})]
    environment = child_environment(PYTHONPATH=os.pathsep.join(map(str, (HERE, TESTS, ROOT))))
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.mark.slow
def test_spread_experts_learn_what_one_process_learns_and_leave_its_adapter(media, tmp_path):
    one, two = (run(count, tmp_path / str(count), media, ep=count) for count in (1, 2))
    assert one.keys() == two.keys() and len(one) > 20
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    first, second = (json.loads((tmp_path / name / "logs.json").read_text()) for name in "12")
    for log, other in zip(first[:-1], second[:-1], strict=True):
        for name in [name for name in log if name.startswith(("loss", "load/", "grad_norm"))]:
            assert other[name] == pytest.approx(log[name], rel=1e-4, abs=1e-5), name
    # One process reads what two have written, and merges it.
    model = tiny_model(OWN)
    inputs = make_inputs(model.config, ("image", 3, "audio"), ("speech", 2))
    outputs = []
    for name in "12":
        loaded = PeftModel.from_pretrained(tiny_model(OWN), tmp_path / name).eval()
        outputs += [loaded(**inputs).logits, loaded.merge_and_unload()(**inputs).logits]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_spread_run_goes_on_bit_for_bit_and_on_more_processes(media, tmp_path):
    whole = run(2, tmp_path / "whole", media, ep=2, steps=4, optim="adamw_torch")
    run(2, tmp_path / "parts", media, ep=2, steps=2, save=2, optim="adamw_torch")
    checkpoint = Path(last_complete_checkpoint(tmp_path / "parts"))
    assert checkpoint.name == "checkpoint-2" and (checkpoint / "optimizer/.metadata").is_file()
    shutil.copytree(tmp_path / "parts", tmp_path / "four")
    settings = {"steps": 4, "resume": True, "optim": "adamw_torch"}
    parts, four = (run(n, tmp_path / name, media, ep=n, **settings) for n, name in ((2, "parts"), (4, "four")))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(four[name], tensor, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    # A run of one process does not read these states, and says so.
    model = tiny_model(OWN)
    trainer = make_own_trainer(media, tmp_path / "x", model, "moe", output_dir=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="is of a run whose model was spread over processes, and this one's is not"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    # Torn: the last file of several processes is not there.
    (checkpoint / "optimizer/.metadata").unlink()
    with pytest.raises(ValueError, match="optimizer/.metadata is missing"):
        last_complete_checkpoint(tmp_path / "parts")


@pytest.mark.slow
def test_the_base_may_be_in_half_precision(media, tmp_path):
    one, two = (run(count, tmp_path / str(count), media, ep=count, dtype="bfloat16", steps=2) for count in (1, 2))
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype == torch.float32
        torch.testing.assert_close(two[name], tensor, atol=0.05, rtol=0.05, msg=lambda m, n=name: f"{n}: {m}")


def wrapped(text: dict):
    model = tiny_model(text)
    return get_peft_model(model, prepare_stage(model, "moe"))


@pytest.mark.parametrize(
    ("text", "sizes", "processes", "message"),
    [
        (OWN, (3, 6), 6, "`expert_parallel_size=3` does not divide the 4 experts of each layer"),
        (OWN, (2, 3), 3, "`expert_parallel_size=2` does not divide the 3 processes"),
        (OWN, (2, 4), 2, "`fsdp_size=4` is not the number of processes, 2; start as many with torchrun"),
        (OWN, (1, None), 1, "is spread over several processes, and this is one; start them with torchrun"),
        ({"shared_expert_base": True}, (2, None), 2, r"these share one, .* grow them with `shared_base=False`"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(text, sizes, processes, message, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    with pytest.raises(ValueError, match=message):
        spread(wrapped(text), *sizes)


def test_one_who_shards_is_enough(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate is configured to shard the model"):
        spread(wrapped(OWN), 2)


class Rows(list):
    """Rows of a data set."""


def made_rows(**counts: int) -> list[dict]:
    rows = []
    for kind, count in counts.items():
        content = [] if kind == "text" else [{"type": kind, "path": f"{kind}.x"}]
        for index in range(count):
            asked = {"role": "user", "content": [*content, {"type": "text", "text": "w " * (index % 5)}]}
            rows.append({"kind": kind, "messages": [asked, {"role": "assistant", "content": "a"}]})
    return rows


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_runs_one_kind_of_tower_for_as_long_as_it_can(processes):
    data = made_rows(image=41, speech=23, audio=30, text=7)
    sampler = ModalityGroupedSampler(data, size=4, lanes=processes)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(data)))  # no row is dropped, none comes twice
        orders.append(order)
        batches = [[data[index]["kind"] for index in order[start : start + 4]] for start in range(0, len(order), 4)]
        whole = [batch for batch in batches if len(set(batch)) == 1]
        assert len(whole) >= 10 + 5 + 7 + 1
        even = (10 + 5 + 7 + 1) // processes
        for process in range(processes):
            kinds = [batch[0] for batch in batches[process : even * processes : processes]]
            assert len(kinds) == even
            changes = sum(first != second for first, second in zip(kinds, kinds[1:], strict=False))
            assert changes <= 2, kinds
    assert orders[0] != orders[1]
