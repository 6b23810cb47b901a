"""
Names of other libraries that Hub files use although nobody promises them: what a new release may take away.

    python modeling_tests/hub/library_names.py [FOLDER]    # prints them, and how many there are

Counted are, each name once: imports of what `transformers` does not export and no page of its documentation names;
methods and attributes beginning with an underscore, or on no page, that a library class has and a class of ours
overrides, declares, reads or calls; and changes of the library's own objects. Of torch and others, names that begin
with an underscore.
"""

import ast
import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import transformers


HUB = Path(__file__).parents[2] / "uni_moe_hf" / "hub"
# Modules that the library's documentation describes, besides what `transformers` exports itself.
DOCUMENTED = {
    "transformers.generation",
    "transformers.image_utils",
    "transformers.audio_utils",
    "transformers.modeling_outputs",
    "transformers.quantizers",
    "transformers.utils.logging",
}
DOCUMENTED_NAMES = {
    ("transformers.utils", "logging"),
    ("transformers.activations", "ACT2FN"),  # "Customizing models"
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),  # "Attention interface"
    ("transformers.processing_utils", "MultiModalData"),  # vLLM's contract, "Transformers as modeling backend"
    ("transformers.video_utils", "load_video"),  # "Video processors"
}


# Methods that the library calls, without an underscore but on no page of its documentation.
UNDOCUMENTED_METHODS = {
    "get_correct_attn_implementation",
    "get_correct_experts_implementation",
    "init_parallel_plans",
    "is_custom_code",
}


class Use(NamedTuple):
    """One name, and how it is used."""

    kind: str
    name: str


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def imports(tree: ast.AST) -> set[Use]:
    """What is imported and nobody promises."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        root = node.module.split(".")[0]
        for alias in node.names:
            if root == "transformers":
                promised = hasattr(transformers, alias.name) or node.module in DOCUMENTED
                promised = promised or (node.module, alias.name) in DOCUMENTED_NAMES
            else:
                promised = not any(map(is_private, [*node.module.split("."), alias.name]))
            if not promised or is_private(alias.name):
                found.add(Use("imported", f"{node.module}.{alias.name}"))
    return found


def overridden(module_name: str) -> set[Use]:
    """What classes of a module define although a base from elsewhere does, and nobody documents it."""
    module = importlib.import_module(module_name)
    written = set(re.findall(r"\w+", Path(module.__file__).read_text(encoding="utf-8")))
    found = set()
    for cls in vars(module).values():
        if not isinstance(cls, type) or cls.__module__ != module_name:
            continue
        # Mixins override in the classes that they are mixed into.
        users = [user for user in _all_classes(module_name.rpartition(".")[0]) if issubclass(user, cls)]
        foreign = {base for user in users for base in user.__mro__ if not base.__module__.startswith("uni_moe_hf")}
        for name, value in vars(cls).items():
            owners = [base for base in foreign if name in vars(base) and base is not object]
            counts = is_private(name) or name in UNDOCUMENTED_METHODS
            if counts and owners and name in written:  # else it was put there by a metaclass or a registry
                is_code = callable(value) or isinstance(value, property | classmethod | staticmethod)
                found.add(Use("overridden" if is_code else "declared", name))
    return found


def _all_classes(package: str) -> set[type]:
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    return {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith(f"{package}.")
    }


def accessed(tree: ast.AST, own: set[str]) -> set[Use]:
    """Attributes beginning with an underscore that no file of ours defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.add(Use("accessed", node.attr))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr")
            and isinstance(node.args[1], ast.Constant)
            and is_private(node.args[1].value)
            and node.args[1].value not in own
        ):
            found.add(Use("accessed", node.args[1].value))
    return found


def changed(tree: ast.AST) -> set[Use]:
    """Objects of the library that are written to."""
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("transformers")
        for alias in node.names
    }
    found = set()
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr in ("setdefault", "update", "register", "append") else []
        for target in targets:
            base = target
            while isinstance(base, ast.Attribute | ast.Subscript):
                base = base.value
            is_written = base is not target or isinstance(node, ast.Call)
            if isinstance(base, ast.Name) and base.id in imported and is_written:
                found.add(Use("changed", base.id))
    return found


def library_names(folder: Path = HUB, package: str = "uni_moe_hf.hub") -> dict[Use, list[str]]:
    """`dict`: name -> the files that use it."""
    files = sorted(folder.glob("*_uni_moe.py"))
    trees = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    own = {
        name
        for tree in trees.values()
        for node in ast.walk(tree)
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
            if isinstance(node, ast.Assign)
            else [node.target.attr]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute)
            else []
        )
    }
    for stem in trees:
        importlib.import_module(f"{package}.{stem}")
    found: dict[Use, list[str]] = {}
    for stem, tree in trees.items():
        uses = imports(tree) | overridden(f"{package}.{stem}") | accessed(tree, own) | changed(tree)
        for use in uses:
            found.setdefault(use, []).append(stem)
    # What is overridden is also called through `super()`, and counts once.
    names = {use.name for use in found if use.kind in ("overridden", "declared")}
    return {use: where for use, where in sorted(found.items()) if use.kind != "accessed" or use.name not in names}


if __name__ == "__main__":
    arguments = [Path(sys.argv[1]), sys.argv[2]] if len(sys.argv) > 2 else []
    table = library_names(*arguments)
    for use, where in table.items():
        sys.stdout.write(f"{use.kind:<11}{use.name:<78}{', '.join(where)}\n")
    kinds = [use.kind for use in table]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    sys.stdout.write(f"{counts} ({len(kinds)} in all)\n")
