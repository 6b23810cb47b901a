"""Two processes on a CPU compute what one does: sharded parameters, spread experts, data side by side."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from distributed import prepare, run
from peft import PeftModel
from safetensors.torch import load_file
from tiny import ROOT, TESTS, child_environment, make_inputs, tiny_model, tiny_processor
from tiny_training import rows, write_media

from uni_moe_hf import FeatureCache, UniMoEDataCollator, UniMoEForConditionalGeneration, encode_rows


HERE = Path(__file__).parent
DENSE = {"mlp_layer_types": ["dense", "dense"]}
OWN = {"shared_expert_base": False}
SHARED = {"shared_expert_base": True}
# Rank 1 has words alone: it must not leave rank 0 waiting for its connectors.
ROWS = ((("image", 5, "audio"), ("speech", 3)), ((9,), (4,)))


def launch(scenario: str, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "distributed.py"), scenario, str(folder)]
    environment = child_environment(PYTHONPATH=os.pathsep.join(map(str, (HERE, TESTS, ROOT))))
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def prepared(folder: Path, text: dict, rows: tuple) -> tuple[UniMoEForConditionalGeneration, list[dict]]:
    model = tiny_model(text)
    model.save_pretrained(folder / "model")
    batches = [make_inputs(model.config, *part, seed=seed) for seed, part in enumerate(rows)]
    for rank, batch in enumerate(batches):
        torch.save(batch, folder / f"batch-{rank}.pt")
    return UniMoEForConditionalGeneration.from_pretrained(folder / "model"), batches


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "text"), [("fsdp", DENSE), ("experts", OWN), ("adapter", SHARED)])
def test_two_processes_have_the_gradients_of_one(scenario, text, tmp_path):
    model, batches = prepared(tmp_path, text, ROWS)
    launch(scenario, tmp_path)
    model = prepare(model, scenario)
    for rank, batch in enumerate(batches):
        expected = run(model, batch)
        found = torch.load(tmp_path / f"logits-{rank}.pt", weights_only=True)
        words = batch["attention_mask"].bool()  # what padding computes is nobody's affair
        torch.testing.assert_close(found[words], expected[words], atol=1e-5, rtol=0)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and len(expected) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_experts_spread_where_all_processes_share_a_batch(tmp_path):
    """Inference with `tp_size=2, ep_size=2`: routes to the other process's experts carry a number behind the last."""
    model, batches = prepared(tmp_path, OWN, (ROWS[0], ROWS[0]))
    torch.save(batches[0], tmp_path / "batch-1.pt")
    launch("tensor_experts", tmp_path)
    with torch.no_grad():
        expected = run(prepare(model, "tensor_experts").eval(), batches[0])
    found = torch.load(tmp_path / "logits-0.pt", weights_only=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def trained(
    folder: Path, media: Path, processes: int, config: str = "ddp", cache: Path | None = None
) -> tuple[list[dict], dict]:
    """
    Logs and weights of a run whose optimiser steps see the same four rows, however many processes share them; by a
    file of `examples/accelerate_configs`, changed in its devices and their number.
    """
    folder.mkdir()
    settings = yaml.safe_load((ROOT / f"examples/accelerate_configs/{config}.yaml").read_text())
    is_deepspeed = settings["distributed_type"] == "DEEPSPEED"
    settings |= {"use_cpu": not is_deepspeed, "num_processes": processes}
    settings |= {"distributed_type": "NO"} if processes == 1 else {}
    assert settings["mixed_precision"] == "no"
    (folder / "accelerate.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    if processes > 1:
        command += ["--main_process_port", str(free_port())]
    command += [str(HERE / "side_by_side.py"), folder, media, 4 // processes, processes]
    command += [] if cache is None else [cache]
    environment = child_environment(PYTHONPATH=os.pathsep.join(map(str, (HERE, TESTS, ROOT))))
    environment |= {"DS_ACCELERATOR": "cpu"} if is_deepspeed else {}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "logs.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_data_parallel_training_loses_what_one_process_loses(tmp_path):
    """`accelerate launch`, DDP, one of the two processes with words alone: losses, weights, and what we log."""
    media = tmp_path / "media"
    media.mkdir()
    write_media(media)
    one, two = (trained(tmp_path / str(count), media, count) for count in (1, 2))
    steps = [[log for log in logs if "loss" in log] for logs in (one[0], two[0])]
    assert len(steps[0]) == len(steps[1]) == 4
    for first, second in zip(*steps, strict=True):
        names = [name for name in first if name.startswith(("loss", "load/"))]
        assert {"loss", "loss/text", "load/max_over_min"} < set(names) and len(names) > 7
        for name in names:
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5), name
    for name, tensor in one[1].items():
        torch.testing.assert_close(two[1][name.replace("module.", "")], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_files_for_accelerate_train_as_one_process_does_from_media_and_from_a_cache(tmp_path):
    """`fsdp2.yaml`: parameters are really sharded, towers may be left out, and the adapter is read by one process."""
    media = tmp_path / "media"
    media.mkdir()
    write_media(media)
    model = tiny_model(SHARED)
    processor = tiny_processor(model.config)
    cache = FeatureCache(tmp_path / "cache", model, processor, fill=True)
    encode_rows(rows(12), model, UniMoEDataCollator(processor, media_root=media), cache)
    _, one = trained(tmp_path / "one", media, 1)
    for name, config, features in (
        ("ddp", "ddp", cache.folder),
        ("sharded", "fsdp2", None),
        ("cached", "fsdp2", cache.folder),
    ):
        _, two = trained(tmp_path / name, media, 2, config, features)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key.replace("module.", "")], tensor, atol=1e-6, rtol=1e-4)
    PeftModel.from_pretrained(tiny_model(SHARED), tmp_path / "sharded/adapter")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_trains_as_one_process_does(tmp_path):
    """The three files, one of the two processes with words alone, towers in memory; the adapter is whole."""
    media = tmp_path / "media"
    media.mkdir()
    write_media(media)
    trained(tmp_path / "one", media, 1)
    one = load_file(tmp_path / "one/adapter/adapter_model.safetensors")
    for stage in (1, 2, 3):
        trained(tmp_path / f"zero{stage}", media, 2, f"deepspeed_zero{stage}")
        two = load_file(tmp_path / f"zero{stage}/adapter/adapter_model.safetensors")
        assert two.keys() == one.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, atol=1e-6, rtol=1e-4)
    PeftModel.from_pretrained(tiny_model(SHARED), tmp_path / "zero3/adapter")


@pytest.mark.parametrize("text", [SHARED, DENSE], ids=["shared", "dense"])
def test_experts_that_cannot_be_spread_have_no_plan_which_the_library_refuses(text):
    assert tiny_model(text).config.text_config.base_model_ep_plan == {}
