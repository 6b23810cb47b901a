"""
What must hold before a release, each in turn, in a clean clone of what is committed: `make release-check`.

    python benchmarks/release_check.py                      # all of it: an hour on two cores
    python benchmarks/release_check.py --only clone,wheel   # some of it

Steps: `size` (of the repository), `pages` (every block of README and docs, the changelog, the version), `wheel`
(built, installed alone, imported, its command run), `clone` (nothing uncommitted, `make test` in a fresh
environment), `demo` (`make demo`, and the README's first block beside what it left), `range` (both ends of the
supported releases of Transformers). Prints a line for each, and ends with exit code 1 where one failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from releases import RELEASES, ROOT


MAX_FILE, MAX_REPOSITORY, MAX_WHEEL = 3e6, 20e6, 1e6  # bytes
# Nothing that happens to be set here may decide.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "MAKE"))}
INSTALLED = """
import uni_moe_hf
from pathlib import Path
assert "site-packages" in uni_moe_hf.__file__, uni_moe_hf.__file__
assert (Path(uni_moe_hf.__file__).parent / "examples/configs/stage3_moe.yaml").is_file()
text = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
model = uni_moe_hf.UniMoEForConditionalGeneration(uni_moe_hf.UniMoEConfig(text_config=text))
print(uni_moe_hf.__version__, sum(p.numel() for p in model.parameters()))
"""


def run(*command: object, cwd: Path, **more: str) -> str:
    """What a command says.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=ENVIRONMENT | more, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise RuntimeError(f"{' '.join(map(str, command))[:120]}: exit code {done.returncode}\n" + "\n".join(said))
    return done.stdout


def clone(place: Path) -> str:
    """The clone's own tests, in an environment that they make."""
    if changed := run("git", "status", "--porcelain", cwd=ROOT).strip():
        raise RuntimeError(f"There is something uncommitted: {changed.splitlines()[0].strip()}")
    return run("make", "test", cwd=place).strip().splitlines()[-1].strip("= ")


def demo(place: Path) -> str:
    """The demo, and the README's first block beside what it left."""
    said = run("make", "demo", cwd=place)
    block = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    answer = run(place / ".venv/bin/python", "-c", block, cwd=place, HF_HUB_OFFLINE="1").strip()
    if answer not in block:
        raise RuntimeError(f"The README's first block answers {answer!r}, which is not what stands beside it.")
    return f"{said.strip().splitlines()[-2]} The first block answers {answer!r}."


def wheel(place: Path) -> str:
    """Built from the clone, installed with nothing but its requirements, imported and asked for help."""
    with tempfile.TemporaryDirectory() as folder:
        environment, out = Path(folder, "env"), Path(folder, "out")
        run(sys.executable, "-m", "build", "--wheel", "--outdir", out, cwd=place)
        (built,) = out.glob("*.whl")
        if built.stat().st_size > MAX_WHEEL:
            raise RuntimeError(f"The wheel has {built.stat().st_size / 1e6:.1f} MB, more than {MAX_WHEEL / 1e6:.0f}.")
        run(sys.executable, "-m", "venv", environment, cwd=place)
        pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", "-c", place / "constraints.txt", built]
        run(*pip, cwd=Path(folder))
        said = run(environment / "bin/python", "-c", INSTALLED, cwd=Path(folder)).strip()
        run(environment / "bin/uni-moe", "--help", cwd=Path(folder))
        return f"{built.name}, {built.stat().st_size / 1e3:.0f} kB: {said}"


def both_ends(place: Path) -> str:
    """The oldest and the newest release that are supported."""
    run(sys.executable, "benchmarks/releases.py", "--only", RELEASES[0], RELEASES[-1], cwd=place)
    return f"Transformers {RELEASES[0]} and {RELEASES[-1]}"


def pages(place: Path) -> str:
    """Blocks run, and what is new is written down."""
    version = re.search(r'__version__ = "(.*)"', (place / "uni_moe_hf/__init__.py").read_text())[1]
    for file, pattern in {"CHANGELOG.md": rf"^## {version}$", "CITATION.cff": rf"^version: {version}$"}.items():
        if not re.search(pattern, (place / file).read_text(encoding="utf-8"), flags=re.MULTILINE):
            raise RuntimeError(f"{file} does not name version {version}.")
    news = re.search(r"## Unreleased\n(.*?)(?=\n## )", (place / "CHANGELOG.md").read_text(), flags=re.DOTALL)
    if news and news[1].strip():
        raise RuntimeError("CHANGELOG.md has news under 'Unreleased'; give them the version's title.")
    command = [sys.executable, "-m", "pytest", "-q", "modeling_tests/test_docs.py"]
    said = run(*command, cwd=place, HF_HUB_OFFLINE="1", PYTHONPATH=str(place))
    return said.strip().splitlines()[-1]


def size(place: Path) -> str:
    """Of what is tracked."""
    files = [place / name for name in run("git", "ls-files", "-z", cwd=place).split("\0") if name]
    sizes = {file.relative_to(place): file.stat().st_size for file in files}
    large = max(sizes, key=sizes.get)
    if sizes[large] > MAX_FILE or sum(sizes.values()) > MAX_REPOSITORY:
        raise RuntimeError(f"{sum(sizes.values()) / 1e6:.1f} MB, of them {sizes[large] / 1e6:.1f} in '{large}'.")
    return f"{sum(sizes.values()) / 1e6:.1f} MB in {len(sizes)} files, the largest {sizes[large] / 1e6:.1f} MB"


STEPS: dict[str, Callable[[Path], str]] = {
    "size": size,
    "pages": pages,
    "wheel": wheel,
    "clone": clone,
    "demo": demo,
    "range": both_ends,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default=",".join(STEPS), help="steps, with commas")
    names = parser.parse_args().only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        sys.exit(f"There is no step '{unknown[0]}'; there are {', '.join(STEPS)}.")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "clone")
        run("git", "clone", "--quiet", ROOT, place, cwd=ROOT)
        for name in names:
            start = time.time()
            try:
                found, mark = STEPS[name](place), "ok"
            except RuntimeError as error:
                found, mark, failed = str(error), "FAILED", True
            print(f"{mark:<7} {name:<6} {(time.time() - start) / 60:5.1f} min  {found}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
