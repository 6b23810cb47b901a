"""Two processes on a CPU compute what one does: sharded parameters, spread experts, data side by side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import prepare, run
from tiny import make_inputs, tiny_model
from transformers.distributed import DistributedConfig

from uni_moe_hf import UniMoEForConditionalGeneration


HERE = Path(__file__).parent
DENSE = {"mlp_layer_types": ["dense", "dense"]}
OWN = {"shared_expert_base": False}
# Rank 1 has words alone: it must not leave rank 0 waiting for its connectors.
ROWS = ((("image", 5, "audio"), ("speech", 3)), ((9,), (4,)))


def launch(scenario: str, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "distributed.py"), scenario, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
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
@pytest.mark.parametrize(("scenario", "text"), [("fsdp", DENSE), ("experts", OWN)])
def test_two_processes_have_the_gradients_of_one(scenario, text, tmp_path):
    model, batches = prepared(tmp_path, text, ROWS)
    launch(scenario, tmp_path)
    prepare(model, scenario)
    for rank, batch in enumerate(batches):
        expected = run(model, batch)
        found = torch.load(tmp_path / f"logits-{rank}.pt", weights_only=True)
        words = batch["attention_mask"].bool()  # what padding computes is nobody's affair
        torch.testing.assert_close(found[words], expected[words], atol=1e-5, rtol=0)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and len(expected) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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


@pytest.mark.parametrize(("text", "kind"), [({"shared_expert_base": True}, "share one base"), (DENSE, "do not exist")])
def test_experts_that_cannot_be_spread_are_refused(text, kind):
    model = tiny_model(text)
    with pytest.raises(
        ValueError, match=f"`ep_size=2` spreads experts over processes, but those of this model {kind}"
    ):
        model._resolve_parallel_plans(DistributedConfig(fsdp_size=2, ep_size=2))
