"""The house as drawn: which folder may import which, what Hub files may need, and how long a file may be."""

import ast
import re
import sys
from pathlib import Path

import pytest
from tiny import PACKAGE, TESTS
from transformers.dynamic_module_utils import get_relative_imports


# From the ground up: a folder may import those before it. `hub` is the Hub line, what travels in checkpoints.
FLOORS = ["hub", "mixtures", "original", "training", "recipes", "evaluation", "insight", "serving", "cli"]
FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
HUB_MODULES = [file.stem for file in FILES if file.parts[0] == "hub" and file.stem != "__init__"]

# Hub file -> the Hub files that it may import. Nothing points back, so nothing goes round.
DRAWING = {
    "compat_uni_moe": set(),
    "configuration_uni_moe": {"compat_uni_moe"},
    "expert_segments_uni_moe": {"compat_uni_moe"},
    "expert_kernels_uni_moe": {"compat_uni_moe", "expert_segments_uni_moe"},
    "experts_uni_moe": {"expert_kernels_uni_moe", "expert_segments_uni_moe"},
    "decoder_uni_moe": {"compat_uni_moe", "configuration_uni_moe", "expert_kernels_uni_moe", "experts_uni_moe"},
    "towers_uni_moe": {"compat_uni_moe", "configuration_uni_moe"},
    "connectors_uni_moe": {"compat_uni_moe", "configuration_uni_moe", "towers_uni_moe"},
    "files_uni_moe": set(),
    "media_uni_moe": {"files_uni_moe"},
    "feature_extraction_uni_moe": {"media_uni_moe"},
    "templates_uni_moe": {"compat_uni_moe", "configuration_uni_moe"},
    "conversations_uni_moe": {"compat_uni_moe", "configuration_uni_moe", "files_uni_moe", "media_uni_moe"}
    | {"templates_uni_moe"},
    "processing_uni_moe": {"configuration_uni_moe", "conversations_uni_moe", "media_uni_moe", "templates_uni_moe"},
    "generation_uni_moe": {"compat_uni_moe", "configuration_uni_moe"},
    "modeling_uni_moe": {"compat_uni_moe", "configuration_uni_moe", "expert_kernels_uni_moe", "generation_uni_moe"}
    | {"decoder_uni_moe", "experts_uni_moe", "connectors_uni_moe", "towers_uni_moe"},
}

# What every installation has, and what a Hub file may use where it is there.
ALLOWED = {"torch", "numpy", "transformers", "huggingface_hub", "tokenizers", "PIL"} | set(sys.stdlib_module_names)
OPTIONAL = {"soundfile", "soxr", "av", "decord", "starlette"}


def source(file: Path) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


def hub_source(module: str) -> str:
    return source(Path("hub", f"{module}.py"))


def relative_imports(text: str) -> list[ast.ImportFrom]:
    """All of them, also inside functions."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]


def imported_modules(file: Path) -> set[Path]:
    """The files of the package that a file imports, also inside functions."""
    found = set()
    for node in relative_imports(source(file)):
        base = file.parents[node.level - 1]
        target = base / Path(*(node.module or "").split("."))
        names = [target.with_suffix(".py")] if node.module else []
        # `from . import a, b` may name modules; what it names besides is defined in `__init__`.
        names += [target / f"{alias.name}.py" for alias in node.names] if not node.module else []
        known = {name for name in names if name in FILES}
        found |= known or {target / "__init__.py"}
    return found


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


def test_every_folder_is_a_floor_of_the_house_and_says_in_two_lines_what_it_is_for():
    folders = {file.parts[0] for file in FILES if len(file.parts) > 1}
    assert folders <= set(FLOORS)
    assert {file.name for file in FILES if len(file.parts) == 1} == {"__init__.py"}
    for folder in folders:
        text = ast.get_docstring(ast.parse(source(Path(folder, "__init__.py"))))
        assert len(text.splitlines()) == 2, folder
        assert len([file for file in FILES if file.parts[0] == folder]) <= 16 + 1, folder  # and `__init__`


def test_a_folder_imports_only_those_below_it():
    for file in FILES:
        if len(file.parts) > 1:
            allowed = FLOORS[: FLOORS.index(file.parts[0]) + 1]
            above = {other for other in imported_modules(file) if other.parts[0] not in allowed}
            # The command registers the model with the Auto classes: the package's own `__init__` is for that.
            assert above <= ({Path("__init__.py")} if file.parts[0] == "cli" else set()), file


def test_the_search_for_imports_finds_every_form(tmp_path, monkeypatch):
    lines = {
        "from .info import describe": Path("cli/info.py"),
        "from ..hub.media_uni_moe import load_image": Path("hub/media_uni_moe.py"),
        "def f():\n    from . import generate": Path("cli/generate.py"),
        "from .. import register": Path("__init__.py"),
    }
    for text, expected in lines.items():
        monkeypatch.setattr(f"{__name__}.source", lambda _, text=text: text)
        assert imported_modules(Path("cli/main.py")) == {expected}


def test_the_drawing_of_the_hub_names_every_file_and_has_no_way_back():
    assert set(HUB_MODULES) == set(DRAWING)
    order = list(DRAWING)
    for module, allowed in DRAWING.items():
        assert all(order.index(name) < order.index(module) for name in allowed)


def test_hub_files_import_only_downwards():
    imported = {module: {node.module for node in relative_imports(hub_source(module))} for module in HUB_MODULES}
    assert {module: names - DRAWING[module] for module, names in imported.items() if names - DRAWING[module]} == {}


def test_the_pipeline_travels_with_the_model():
    assert "generation_uni_moe" in {node.module for node in relative_imports(hub_source("modeling_uni_moe"))}


def test_no_module_imports_in_a_circle():
    graph = {file: imported_modules(file) - {file} for file in FILES if file != Path("__init__.py")}
    while leaves := [file for file, imported in graph.items() if not imported & set(graph)]:
        for file in leaves:
            del graph[file]
    assert not graph


@pytest.mark.parametrize("module", HUB_MODULES)
def test_relative_imports_of_hub_files_are_in_the_form_that_the_hub_follows(module):
    text = hub_source(module)
    for node in relative_imports(text):
        assert node.level == 1 and node.module in HUB_MODULES
    for line in re.findall(r"^[ \t]*(?:from[ \t]+\.|import[ \t]+\.).*$", text, re.MULTILINE):
        assert re.fullmatch(r"[ \t]*from \.[a-z_]+ import \S.*", line)
    # What the library's own search finds, docstrings included, is what Python imports.
    found = get_relative_imports(PACKAGE / "hub" / f"{module}.py")
    assert set(found) == {node.module for node in relative_imports(text)}


def test_hub_files_need_only_what_every_installation_has():
    for module in HUB_MODULES:
        for name, guarded in absolute_imports(ast.parse(hub_source(module))):
            assert name in (ALLOWED | OPTIONAL if guarded else ALLOWED), f"{module}: {name} outside a try"


def test_the_package_is_not_imported_by_its_own_name():
    for file in FILES:
        assert "uni_moe_hf" not in {name for name, _ in absolute_imports(ast.parse(source(file)))}, file


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


def test_a_module_can_be_read_in_one_sitting():
    lengths = {str(file): len(source(file).splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_tests_stand_in_the_folders_of_what_they_test():
    """A name only once: without packages among tests, a second one would hide the first."""
    files = [file.relative_to(TESTS) for file in TESTS.rglob("test_*.py")]
    assert {file.parts[0] for file in files if len(file.parts) > 1} <= set(FLOORS)
    assert len({file.name for file in files}) == len(files)
