"""The wheel holds the package, and imports with nothing but its own requirements."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tiny import PACKAGE, ROOT


SITE = Path(sysconfig.get_paths()["purelib"])
# What only the extras bring. `tests` proves that they are really absent.
EXTRAS = ("trl", "peft", "accelerate", "datasets", "av", "espeakng_loader", "pytest", "ruff", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in (PACKAGE, ROOT / "examples"):
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_the_scripts_the_tasks_the_type_marker_and_the_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = {PACKAGE: [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml")]}
    files[ROOT] = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/configs/*.yaml")]
    modules = {f"uni_moe_hf/{file.relative_to(root).as_posix()}" for root, each in files.items() for file in each}
    assert modules | {"uni_moe_hf/py.typed"} == {name for name in names if name.startswith("uni_moe_hf/")}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_imports_in_an_environment_without_extras(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env/bin/python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    # The requirements are linked, not installed: tests run offline and torch is large.
    for entry in SITE.iterdir():
        name = entry.name.lower()
        if not name.startswith((*EXTRAS, "uni_moe", "__editable__", "_", "uni-moe")) or name.startswith(
            ("_cffi", "_soundfile")
        ):
            (site / entry.name).symlink_to(entry)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    check = f"""
import importlib.util, uni_moe_hf
assert not [name for name in {EXTRAS!r} if importlib.util.find_spec(name)], "extras are visible"
assert uni_moe_hf.__file__.startswith({str(tmp_path)!r}), uni_moe_hf.__file__
from uni_moe_hf import UniMoEConfig, UniMoEForConditionalGeneration, UniMoEDataCollator, grow_experts, prepare_stage
text = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = UniMoEForConditionalGeneration(UniMoEConfig(text_config=text))
try:
    prepare_stage(model, "moe")
except ImportError as error:
    print(error)
"""
    run = subprocess.run([python, "-I", "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "pip install uni-moe-hf[train]" in run.stdout
