"""The names that users may rely on, what importing costs, and the house rules that a machine can keep."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib

import pytest
from tiny import PACKAGE, ROOT

import uni_moe_hf


MODULES = sorted(PACKAGE.rglob("*.py"))

# Adding a name is a decision, taking one away breaks users: both are made here.
PUBLIC = {
    "AnyToTextPipeline",
    "BeatsConfig",
    "BeatsModel",
    "FeatureCache",
    "GenerationCallback",
    "LiveFiguresCallback",
    "RoutingFiguresCallback",
    "StageArguments",
    "UniMoEConfig",
    "UniMoEDataCollator",
    "UniMoEFeatureExtractor",
    "UniMoEForConditionalGeneration",
    "UniMoEModel",
    "UniMoEPreTrainedModel",
    "UniMoEProcessor",
    "UniMoESFTTrainer",
    "YamnetConfig",
    "YamnetFeatureExtractor",
    "YamnetModel",
    "__version__",
    "add_expert",
    "balance_routers",
    "build_processor",
    "check_rows",
    "clone_expert",
    "complete_card",
    "connector_statistics",
    "convert_checkpoint",
    "drop_expert",
    "encode_rows",
    "evaluate",
    "export_expert",
    "export_expert_stack",
    "from_pretrained_parts",
    "grow_experts",
    "last_complete_checkpoint",
    "load_rows",
    "load_task",
    "merge_experts",
    "merge_modalities",
    "moe_lora_config",
    "plan_stage",
    "prepare_stage",
    "record_routing",
    "revert_checkpoint",
    "routing_report",
    "row_to_messages",
    "sft_config",
    "spread",
    "start_routers",
}


def test_public_names_are_the_agreed_ones_in_order():
    assert uni_moe_hf.__all__ == sorted(PUBLIC)


def test_dir_lists_the_public_names():
    assert dir(uni_moe_hf) == sorted(PUBLIC)


def test_every_public_name_is_what_its_module_defines():
    for name in PUBLIC - {"__version__"}:
        value = getattr(uni_moe_hf, name)
        assert value.__name__ == name
        assert value.__module__.startswith("uni_moe_hf.")
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert name in importlib.import_module(value.__module__).__all__


def test_a_star_import_brings_all_of_them():
    namespace = {}
    exec("from uni_moe_hf import *", namespace)
    assert set(namespace) - {"__builtins__"} == PUBLIC


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'uni_moe_hf' has no attribute 'UniMoE'"):
        uni_moe_hf.UniMoE  # noqa: B018
    assert not hasattr(uni_moe_hf, "nonsense")


def test_the_version_is_one_of_pep_440():
    numbers = uni_moe_hf.__version__.split(".")
    assert len(numbers) == 3 and all(number.isdigit() for number in numbers)


def test_importing_the_package_leaves_tools_and_their_needs_alone():
    code = (
        "import json, sys, uni_moe_hf, transformers.pipelines as p; "
        "print(json.dumps([sorted(sys.modules), p.PIPELINE_REGISTRY.get_supported_tasks(), dir(uni_moe_hf)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded, tasks, names = json.loads(run.stdout.splitlines()[-1])
    hub = {"uni_moe_hf.hub"} | {f"uni_moe_hf.hub.{file.stem}" for file in (PACKAGE / "hub").glob("*_uni_moe.py")}
    assert {name for name in loaded if name.startswith("uni_moe_hf.")} == hub
    heavy = {"trl", "peft", "datasets", "av", "decord", "matplotlib", "gradio", "pandas", "scipy", "torchvision"}
    assert not heavy & set(loaded)
    assert "any-to-text" in tasks
    assert set(names) == PUBLIC


def test_everything_public_has_a_docstring():
    def without(node: ast.AST, name: str) -> list[str]:
        missing = [] if ast.get_docstring(node) else [name]
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                inner = child if isinstance(child, ast.ClassDef) else ast.Module(body=[], type_ignores=[])
                missing += [] if ast.get_docstring(child) else [f"{name}.{child.name}"]
                missing += [m for m in without(inner, f"{name}.{child.name}") if m != f"{name}.{child.name}"]
        return missing

    for file in MODULES:
        name = file.relative_to(PACKAGE).as_posix()
        assert without(ast.parse(file.read_text(encoding="utf-8")), name) == []


def test_the_linter_forbids_prints_and_dead_code_in_the_package():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert {"T20", "ERA", "E", "F", "RUF022"} <= set(lint["select"])
    assert not {"T20", "ERA"} & {rule[:3] for rule in lint.get("ignore", [])}
    assert {"examples/*", "benchmarks/*"} >= set(lint.get("per-file-ignores", {}))


def test_types_are_announced():
    assert (ROOT / "uni_moe_hf" / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["uni_moe_hf"]
