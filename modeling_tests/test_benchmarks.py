"""The benchmark scripts still run: their smallest cases, whose numbers must agree; nothing here is timed."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import ROOT


SMALLEST = {
    "bench_conversion.py": ["--layers", "2", "--hidden", "512", "--inner", "1376", "--shards", "1", "--repeats", "1"],
    "bench_evaluation.py": ["--rounds", "1"],
    "bench_experts.py": ["--only", "tiny E4", "--repeats", "2"],
    "bench_families.py": ["--only", "Qwen3,Phi-3,Gemma 2", "--check", "merge"],
    "bench_frontends.py": ["--repeats", "2"],
    "bench_hostile_files.py": ["--limit", "60"],
    "bench_memory.py": ["--only", "tiny"],
    "bench_parity.py": [],
    "bench_training.py": ["--size", "tiny", "--rounds", "1", "--rows", "4", "--threads", "1", "--only", "parts,cache"],
    "bench_routing.py": ["--repeats", "2"],
    "bench_training_logs.py": ["--repeats", "2", "--steps", "2"],
}


def test_every_benchmark_is_listed_here():
    assert {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")} == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_starts_and_says_that_there_is_none(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    for name in ("gpu_experts.md", "gpu_training.md"):
        assert (tmp_path / name).read_text() == "There is no GPU here, so nothing was measured on one.\n"
    assert "skipped" in (tmp_path / "gpu_tests.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALLEST)
def test_a_benchmark_writes_its_table(script, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / script, *SMALLEST[script], "--output", tmp_path / "table.md"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=one_thread)
    assert run.returncode == 0, run.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in run.stdout
    assert len([line for line in table.splitlines() if line.startswith("| ")]) > 3
    assert "DISAGREES" not in table
