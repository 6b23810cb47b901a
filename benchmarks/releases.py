"""
One checkpoint folder under every supported release of Transformers: what runs on which.

    python benchmarks/releases.py                       # a quarter of an hour on two cores, 1.5 GB of disk a release
    python benchmarks/releases.py --only 5.16.1 5.24.0  # some releases; no table is written
    python benchmarks/releases.py --newest              # `make test` with everything unpinned but torch

Each release has an environment of its own in `.releases/`, kept between runs, with the torch of `constraints.txt` and
whatever else pip takes for it. There run the tests of the Hub files, on the oldest and the newest release the tests of
training and tools as well. Then a tiny model is saved under every release and loaded under every other one, in
processes without this package (`modeling_tests/hub/saved_folder.py`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[1]
TESTS = ROOT / "modeling_tests"
RELEASES = ("5.16.1", "5.18.0", "5.19.0", "5.20.2", "5.22.2", "5.23.0", "5.24.0")
# As many processes at a time as there are cores, with a thread each: sums then have one order everywhere.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))},
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
LIBRARIES = ("torch", "huggingface_hub", "tokenizers", "trl", "peft", "accelerate", "datasets")
# Where training and tools are tested, on the oldest and the newest release.
TOOLS = ["mixtures", "original", "training", "recipes", "evaluation", "insight", "cli", "test_examples.py"]
# Logits, of order 0.3, in float32; words and whatever the processor makes must be the same.
TOLERANCE = 1e-5
INSTALLED = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "-"
print(json.dumps(found))
"""


def pinned(name: str) -> str:
    """`name==version`, as `constraints.txt` has it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def python_of(release: str) -> Path:
    """The interpreter of a release's environment, which is made or brought up to date when requirements change."""
    folder = ROOT / ".releases" / release
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if release == "newest":
        wanted = [pinned("torch"), "-e", f"{ROOT}[dev]"]
    else:
        extras = f"{ROOT}[train,evaluate,convert]"
        wanted = [pinned("torch"), f"transformers=={release}", "-e", extras, "av", "hypothesis"]
        wanted += ["pytest"]
    # What is unpinned is looked up anew every day.
    state = "\n".join([*wanted, (ROOT / "pyproject.toml").read_text(), *([str(date.today())] * (release == "newest"))])
    if stamp.is_file() and stamp.read_text() == state:
        return python
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    newer = ["--upgrade", "--upgrade-strategy", "eager"] if release == "newest" else []
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *newer, *wanted], check=True)
    stamp.write_text(state)
    return python


def libraries(release: str) -> dict[str, str]:
    """What is installed beside a release."""
    command = [python_of(release), "-c", INSTALLED, *LIBRARIES]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run_tests(release: str, paths: list[str], log: Path) -> str:
    """`N passed, N failed` of the tests; all that they print goes to `log`."""
    leave = [f"--ignore={TESTS / 'hub' / name}" for name in ("test_quantization.py", "test_serve.py")]
    command = [python_of(release), "-m", "pytest", "-q", "-m", "not slow", *leave, *(str(TESTS / p) for p in paths)]
    with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    last = log.read_text().rstrip().splitlines()[-1]
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", last)
    return ", ".join(f"{count} {what}" for count, what in counts) or f"no summary: {last}"


def save_under(release: str, folder: Path) -> None:
    """A tiny model and what it answers, saved under a release."""
    folder.mkdir(parents=True)
    script = TESTS / "hub" / "saved_folder.py"
    subprocess.run([python_of(release), script, "save", folder], cwd=ROOT, env=ENVIRONMENT, check=True)


def load_under(release: str, folders: list[Path], results: Path) -> dict[str, dict]:
    """What the folders give under a release, by the release that saved them."""
    script = TESTS / "hub" / "saved_folder.py"
    with tempfile.TemporaryDirectory() as modules:
        environment = {**ENVIRONMENT, "HF_MODULES_CACHE": modules}
        command = [python_of(release), script, "check", results, *folders]
        subprocess.run(command, cwd=results.parent, env=environment, check=True)
    return {Path(folder).name: found for folder, found in json.loads(results.read_text()).items()}


def verdict(found: dict) -> str:
    """A cell of the matrix: the largest difference of logits, or what is wrong."""
    if "error" in found:
        return f"**{found['error'][:60]}**"
    wrong = [
        name
        for name, gap in found["gaps"].items()
        if isinstance(gap, str) or gap > (0 if name.startswith(("words", "inputs")) else TOLERANCE)
    ]
    return f"**{', '.join(wrong)}**" if wrong else f"{found['gaps']['logits']:.1e}"


def tables(rows: list[dict], matrix: dict[str, dict]) -> str:
    """Markdown: what ran on which release, and what was saved under one and loaded under another."""
    names = [name for name in LIBRARIES if name != "torch"]
    lines = [
        "# One folder, every release",
        "",
        f"{date.today()}, Python {sys.version.split()[0]}, torch {rows[0]['libraries']['torch']}; "
        "`make test-releases` makes it anew.",
        "",
        f"| transformers | {' | '.join(names)} | tests of the Hub files | tests of training and tools |",
        f"|---|{'---|' * len(names)}---|---|",
    ]
    for row in rows:
        versions = " | ".join(row["libraries"][name] for name in names)
        lines.append(f"| {row['release']} | {versions} | {row['hub']} | {row['tools']} |")
    releases = [row["release"] for row in rows]
    lines += [
        "",
        "Saved under the release on the left, loaded under that above in a process without this package: the "
        f"largest difference of logits in float32 (at most {TOLERANCE:.0e}). All tensors of the processor, and the "
        "words of greedy and beam search, with a cache, without, with a static one, in chunks and over a filled one, "
        "are the same, else they are named.",
        "",
        f"| saved under | {' | '.join(releases)} |",
        f"|---|{'---|' * len(releases)}",
    ]
    for saved in releases:
        lines.append(f"| {saved} | {' | '.join(verdict(matrix[loaded][saved]) for loaded in releases)} |")
    said = sorted({text for found in matrix[releases[-1]].values() for text in found.get("deprecated", [])})
    lines += [
        "",
        f"Warnings of names that will go, on {releases[-1]}: {'; '.join(said) or 'none'}.",
        "",
        "Skipped is what the library itself cannot do there: several answers of a pipeline before 5.23, and before "
        "5.22 a prompt in chunks over a filled cache, which is refused in one sentence. Quantisation and serving, "
        "which need libraries of their own, are tested on the newest release alone, by `make test`.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RELEASE", help="these releases; no table is written")
    parser.add_argument("--newest", action="store_true", help="the whole suite, everything unpinned but torch")
    parser.add_argument("--no-tests", action="store_true", help="the matrix alone; no table is written")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/releases.md")
    options = parser.parse_args()
    if options.newest:
        command = [python_of("newest"), "-m", "pytest", "-m", "not slow"]
        sys.exit(subprocess.run(command, cwd=ROOT, env=ENVIRONMENT).returncode)

    releases = tuple(options.only or RELEASES)
    logs = ROOT / ".releases"
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for release in releases:
            python_of(release)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            folders = [root / "saved" / release for release in releases]
            print("saving", flush=True)
            list(pool.map(save_under, releases, folders))
            print("loading", flush=True)
            found = pool.map(lambda release: load_under(release, folders, root / f"{release}.json"), releases)
            matrix = dict(zip(releases, found, strict=True))
            runs = {}
            if not options.no_tests:
                print("testing", flush=True)
                for release in releases:
                    if release in (RELEASES[0], RELEASES[-1]):
                        log = logs / f"{release}-tools.log"
                        runs[release, "tools"] = pool.submit(run_tests, release, TOOLS, log)
                    runs[release, "hub"] = pool.submit(run_tests, release, ["hub"], logs / f"{release}-hub.log")
        for release in releases:
            row = {"release": release, "libraries": libraries(release), "hub": "-", "tools": "-"}
            rows.append(row | {name: run.result() for (of, name), run in runs.items() if of == release})
    text = tables(rows, matrix)
    print(text)
    if not options.only and not options.no_tests:
        options.output.write_text(text)
    failed = [row for row in rows if re.search("failed|error|no summary", row["hub"] + row["tools"])]
    cells = [verdict(found) for row in matrix.values() for found in row.values()]
    sys.exit(1 if failed or any(cell.startswith("**") for cell in cells) else 0)


if __name__ == "__main__":
    main()
