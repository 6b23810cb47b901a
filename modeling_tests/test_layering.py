"""The house as drawn: who may import whom, what Hub files may need, and how long a file may be."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports


PACKAGE = Path(__file__).parents[1] / "uni_moe_hf"
MODULES = sorted(file.stem for file in PACKAGE.glob("*.py") if file.stem != "__init__")
HUB_MODULES = [module for module in MODULES if module.endswith("_uni_moe")]

# Hub file -> the Hub files that it may import. Nothing points back, so nothing goes round.
MIDDLE = {"experts_uni_moe", "connectors_uni_moe", "beats_uni_moe"}
DRAWING = {
    "configuration_uni_moe": set(),
    "quantization_uni_moe": set(),
    "expert_segments_uni_moe": set(),
    "expert_kernels_uni_moe": {"configuration_uni_moe", "expert_segments_uni_moe", "quantization_uni_moe"},
    "experts_uni_moe": {"configuration_uni_moe", "expert_kernels_uni_moe", "quantization_uni_moe"},
    "connectors_uni_moe": {"configuration_uni_moe"},
    "beats_uni_moe": {"configuration_uni_moe"},
    "media_uni_moe": set(),
    "feature_extraction_uni_moe": {"configuration_uni_moe", "media_uni_moe"},
    "pipeline_uni_moe": set(),
    "generation_uni_moe": {"configuration_uni_moe"},
    "modeling_uni_moe": {"configuration_uni_moe", "expert_kernels_uni_moe", "generation_uni_moe", "pipeline_uni_moe"}
    | {"quantization_uni_moe"}
    | MIDDLE,
    "processing_uni_moe": {"configuration_uni_moe", "feature_extraction_uni_moe", "media_uni_moe"},
}
TOOLS = {"composition", "stages", "data", "training", "routing", "plotting", "cli"}
TOOLS |= {"expert_adapters", "elastic_experts", "row_files"}
TOOLS |= {"checkpoints", "original_format", "original_files", "conversion", "merging", "model_card"}

# What every installation has, and what a Hub file may use where it is there.
ALLOWED = {"torch", "numpy", "transformers", "huggingface_hub", "tokenizers", "PIL"} | set(sys.stdlib_module_names)
OPTIONAL = {"soundfile", "soxr", "av", "decord"}


def source(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def relative_imports(module: str) -> list[ast.ImportFrom]:
    """All of them, also inside functions."""
    return [node for node in ast.walk(ast.parse(source(module))) if isinstance(node, ast.ImportFrom) and node.level]


def absolute_imports(node: ast.AST, guarded: bool = False) -> list[tuple[str, bool]]:
    """Top-level package of every absolute import below `node`, and whether it stands in the body of a `try`."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [(alias.name.split(".")[0], guarded) for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and not child.level:
            found.append((child.module.split(".")[0], guarded))
        else:
            tried = isinstance(node, ast.Try) and child in node.body
            found += absolute_imports(child, guarded or tried)
        if isinstance(node, ast.Try) and child in node.body and isinstance(child, ast.Import | ast.ImportFrom):
            found[-1] = (found[-1][0], True)
    return found


def test_every_module_stands_in_the_drawing():
    assert set(HUB_MODULES) == set(DRAWING)
    assert set(MODULES) - set(HUB_MODULES) <= TOOLS
    assert not [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_the_drawing_has_no_way_back():
    order = list(DRAWING)
    for module, allowed in DRAWING.items():
        assert all(order.index(name) < order.index(module) for name in allowed)


@pytest.mark.parametrize("module", HUB_MODULES)
def test_hub_files_import_only_downwards(module):
    imported = {node.module for node in relative_imports(module)}
    assert imported <= DRAWING[module]


def test_the_pipeline_travels_with_the_model():
    assert "pipeline_uni_moe" in {node.module for node in relative_imports("modeling_uni_moe")}
    assert not relative_imports("pipeline_uni_moe")


def test_no_module_imports_in_a_circle():
    graph = {module: {node.module for node in relative_imports(module)} for module in MODULES}
    while leaves := [module for module, imported in graph.items() if not imported & set(graph)]:
        for module in leaves:
            del graph[module]
    assert not graph


@pytest.mark.parametrize("module", HUB_MODULES)
def test_relative_imports_of_hub_files_are_in_the_form_that_the_hub_follows(module):
    for node in relative_imports(module):
        assert node.level == 1 and node.module in HUB_MODULES
    for line in re.findall(r"^[ \t]*(?:from[ \t]+\.|import[ \t]+\.).*$", source(module), re.MULTILINE):
        assert re.fullmatch(r"[ \t]*from \.[a-z_]+ import \S.*", line)
    # What the library's own search finds, docstrings included, is what Python imports.
    found = get_relative_imports(PACKAGE / f"{module}.py")
    assert set(found) == {node.module for node in relative_imports(module)}


@pytest.mark.parametrize("module", HUB_MODULES)
def test_hub_files_need_only_what_every_installation_has(module):
    for name, guarded in absolute_imports(ast.parse(source(module))):
        assert name in (ALLOWED | OPTIONAL if guarded else ALLOWED), f"{name} outside a try"


@pytest.mark.parametrize("module", MODULES)
def test_the_package_is_not_imported_by_its_own_name(module):
    assert "uni_moe_hf" not in {name for name, _ in absolute_imports(ast.parse(source(module)))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import a.b, c", [("a", False), ("c", False)]),
        ("def f():\n    from a import b", [("a", False)]),
        (
            "try:\n    import a\nexcept ImportError:\n    import b\nelse:\n    import c",
            [("a", True), ("b", False), ("c", False)],
        ),
        ("def f():\n    try:\n        if x:\n            import a\n    finally:\n        pass", [("a", True)]),
        ("from .a import b", []),
    ],
)
def test_the_search_for_imports_knows_guarded_ones(text, expected):
    assert absolute_imports(ast.parse(text)) == expected


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_a_module_can_be_read_in_one_sitting(module):
    assert len(source(module).splitlines()) <= 600
