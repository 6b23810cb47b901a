"""`docs/your_data.md` as written: from a folder of files to a model that answers about files it has never seen."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, child_environment


PAGE = (ROOT / "docs/your_data.md").read_text(encoding="utf-8")
# What is left of the page: a page in the browser that stays open, and the Hub.
NOT_HERE = ("uni-moe web", "hf upload")
MARGIN = 0.5  # how far above chance held-out files must be named, and above another file's in the right one's place


def printed() -> list[str]:
    """The commands of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith(NOT_HERE)]


def test_the_page_has_one_command_a_step():
    steps = re.findall(r"^## (\d)\. ", PAGE, flags=re.MULTILINE)
    assert steps == [str(number) for number in range(8)]
    assert [shlex.split(line)[:3] for line in printed()][1:3] == [
        ["uni-moe", "data", "rows"], ["uni-moe", "data", "check"],
    ]  # fmt: skip


@pytest.mark.slow
def test_a_folder_of_files_becomes_a_model_that_answers_about_held_out_ones(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = child_environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="2")
    bad = {"uni-moe data rows": 1}  # a picture and a recording are broken, which is said
    start = time.monotonic()
    for line in printed():
        words = shlex.split(line)
        words[:1] = [sys.executable, "-m", "uni_moe_hf.cli"] if words[0] == "uni-moe" else [sys.executable]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        wanted = next((code for begin, code in bad.items() if line.startswith(begin)), 0)
        assert done.returncode == wanted, (line, done.stdout[-2000:], done.stderr[-3000:])
    own = tmp_path / "outputs/own"
    assert time.monotonic() - start < 15 * 60
    with Image.open(own / "sheet.png") as sheet:
        assert sheet.width > 1000
    for stage in ("connectors", "experts/vision", "experts/audio", "experts/speech", "moe"):
        assert (own / "mine" / stage / "figures/losses.png").is_file()
    found, control = (figures(own / f"mine/{name}.json") for name in ("evaluation", "evaluation_other_media"))
    assert set(found) == {"clips", "memos", "pictures", "sounds"}
    for task, (right, chance) in found.items():
        assert right > chance + MARGIN and right > control[task][0] + MARGIN, (task, right, chance, control[task])


def figures(file: Path) -> dict[str, tuple[float, float]]:
    """Task -> share that is right, and by chance."""
    groups = json.loads(file.read_text())["figures"]
    values = {name: (each["exact_match"]["value"], each["chance"]["value"]) for name, each in groups.items()}
    return {name: pair for name, pair in values.items() if name != "all"}
