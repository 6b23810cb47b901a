"""
All that needs a GPU, unattended and in under nine minutes: the tests marked `gpu`, then the experts, then training
steps. Each part has a limit of time, and what it wrote before stays.

    python benchmarks/gpu.py [--output benchmarks/results]

Writes `gpu_tests.txt`, `gpu_experts.md` and `gpu_training.md` there. Where there is no GPU each part says so.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
SECTIONS = "parts,dense,generation,growth,checkpointing,cache"  # what time may not reach comes last
# Name, seconds at most, command without its output file.
PARTS = (
    ("gpu_tests.txt", 120, ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:randomly", "modeling_tests/test_gpu.py"]),
    ("gpu_experts.md", 170, ["benchmarks/bench_experts.py", "--device", "cuda", "--repeats", "5"]),
    (
        "gpu_training.md",
        240,
        ["benchmarks/bench_training.py", "--device", "cuda", "--rounds", "3", "--only", SECTIONS],
    ),
)


def main() -> None:
    """Exit code 1 where a part failed or took too long."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    failed = False
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    for name, limit, command in PARTS:
        file, start = args.output / name, time.time()
        is_table = name.endswith(".md")
        command = [sys.executable, *command, *(["--output", str(file)] if is_table else [])]
        try:
            done = subprocess.run(
                command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=limit
            )
            code, text = done.returncode, done.stdout + ("" if done.returncode == 0 else done.stderr[-4000:])
        except subprocess.TimeoutExpired as error:
            code, text = 124, (error.stdout or b"").decode(errors="replace")
        if not is_table:
            file.write_text(text, encoding="utf-8")
        failed |= code != 0
        sys.stdout.write(f"== {name}: exit code {code}, {time.time() - start:.0f} s\n{text}\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
