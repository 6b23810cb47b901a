"""Killed at any moment, a run ends with the very weights of an uninterrupted one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, TESTS, child_environment
from tiny_training import write_media


HERE = Path(__file__).parent
ENVIRONMENT = child_environment(PYTHONPATH=f"{TESTS}{os.pathsep}{ROOT}")
STAGES = ("connectors", "experts", "moe")
# A run has 24 optimiser steps of two micro-batches each, and saves twelve times.
MOMENTS = {
    "inside an accumulation": ["step", 8],
    "inside the weights": ["weights", 2],
    "inside a pickle": ["pickle", 2],
}


def digests(stage: str, root: Path, media: Path, kills: list) -> tuple[str, str, str]:
    """Of the weights of an uninterrupted and of a killed run; and what happened."""
    runs = {str(root / "whole"): [["none"]], str(root / "killed"): [*kills, ["none"]]}
    command = [sys.executable, HERE / "resuming.py", stage, media, json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=600, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return (root / "whole/digest").read_text(), (root / "killed/digest").read_text(), done.stdout


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


def test_a_mixture_killed_in_a_save_and_in_an_accumulation_ends_the_same(media, tmp_path):
    whole, killed, story = digests("moe", tmp_path, media, list(MOMENTS.values()))
    assert story.count("-> 9") == 3, story  # each start was killed
    assert killed == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments_a_run_ends_the_same(stage, seed, media, tmp_path):
    draw = random.Random(seed)
    kills = [["time", draw.uniform(0.3, 1.2)], ["step", draw.randint(1, 9)], ["weights", draw.randint(1, 2)]]
    kills += [["pickle", draw.randint(1, 4)], ["time", draw.uniform(0.3, 1.2)]]
    draw.shuffle(kills)
    whole, killed, story = digests(stage, tmp_path, media, kills)
    assert story.count("-> 9") >= 3, story
    assert killed == whole
