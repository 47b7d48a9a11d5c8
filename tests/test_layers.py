"""The layout: folders whose imports go down only, and the README's tree, which names every file."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT, loaded_after

import unet_ray

PACKAGE = Path(unet_ray.__file__).parent
ORDER = [
    "__main__",
    "cli",
    "demo",
    "doctor",
    "report",
    "api",
    "selection",
    "evaluation",
    "training",
    "inference",
    "ray_backend",
    "models",
    "metrics",
    "data",
    "settings",
    "custom_parts",
    "config",
    "own_process",
    "keys",
    "registry",
]
"""The folders and files of the package from top to bottom: each imports from itself and from what stands below."""
APART = [{"training", "inference"}]
"""Neighbours that never import each other: they meet in a model directory."""


def imports(package: Path) -> dict[str, set[str]]:
    """Returns module -> what it imports, anywhere in the file. Modules are dotted; the keys lack `unet_ray.`."""
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name == "__init__":  # loads each public name at its first use
            continue
        used = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports are absolute"
                used.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found


def folder(module: str) -> str:
    """Returns the folder or file of the package, as ORDER names it."""
    return module.split(".")[0]


def upward(package: Path) -> list[str]:
    """Returns the imports that break the order, as `importer -> imported`."""
    level = {name: number for number, name in enumerate(ORDER)}
    wrong = []
    for module, used in imports(package).items():
        for other in {folder(u.removeprefix("unet_ray.")) for u in used if u.startswith("unet_ray.")} & set(level):
            importer = folder(module)
            if level[other] < level[importer] or any({importer, other} == pair for pair in APART):
                wrong.append(f"{module} -> {other}")
    return sorted(wrong)


def test_every_folder_and_file_has_its_place():
    assert {folder(module) for module in imports(PACKAGE)} - {"recipes"} == set(ORDER)


def test_imports_go_down_only():
    assert upward(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "line", "wrong"),
    [
        ("data/imaging.py", "from unet_ray.models import device", "data.imaging -> models"),
        ("training/loop.py", "def late():\n    import unet_ray.inference.predict", "training.loop -> inference"),
        ("inference/stages.py", "from unet_ray.training.loop import fit", "inference.stages -> training"),
        ("config.py", "from unet_ray import settings", "config -> settings"),
    ],
)
def test_an_import_upward_is_found(place, line, wrong, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(line)
    assert upward(tmp_path) == [wrong]


def test_only_the_ray_backend_imports_ray():
    users = {module for module, used in imports(PACKAGE).items() if any(folder(name) == "ray" for name in used)}
    assert {folder(module) for module in users} == {"ray_backend"}


def test_no_files_import_each_other_in_a_circle():
    graph = {
        module: {u.removeprefix("unet_ray.") for u in used if u.startswith("unet_ray.")}
        for module, used in imports(PACKAGE).items()
    }
    graph = {module: used & set(graph) - {module, folder(module)} for module, used in graph.items()}
    while leaves := {module for module, used in graph.items() if not used}:
        graph = {module: used - leaves for module, used in graph.items() if module not in leaves}
    assert graph == {}


def test_the_package_and_the_help_load_neither_torch_nor_ray():
    assert not {"torch", "ray", "numpy", "pyarrow"} & loaded_after("import unet_ray")
    assert not {"torch", "ray", "numpy", "pyarrow"} & loaded_after("import unet_ray.cli")


def test_prediction_starts_without_scipy_which_loads_longer_than_our_code():
    assert "scipy" not in loaded_after("import unet_ray.inference.predict")


def test_training_and_prediction_in_one_process_load_no_ray():
    modules = "unet_ray.training.run, unet_ray.inference.predict, unet_ray.evaluation.evaluate"
    assert "ray" not in loaded_after(f"import {modules}")


README = (ROOT / "README.md").read_text()


def named_in_tree(readme: str) -> set[str]:
    """Returns the files and folders that the block below `## What is where` names, as paths from the repository's root.

    A line names one file or folder, indented below its folder. A folder's line may also name files of that folder in
    its text, as in `models/  unet.py: the U-Net family; base.py: what all networks share`.
    """
    block = re.search(r"^## What is where\n.*?^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert block, "the README has no tree"
    found = set()
    above: list[tuple[int, str]] = []
    for line in filter(str.strip, block[1].splitlines()):
        indent = len(line) - len(line.lstrip())
        name, _, text = line.strip().partition(" ")
        above = [(column, parent) for column, parent in above if column < indent]
        path = "".join(parent for _, parent in above) + name
        found.add(path)
        if name.endswith("/"):
            above.append((indent, name))
            found.update(path + file for file in re.findall(r"\b\w+\.py\b", text))
    return found


def test_the_readmes_tree_names_every_file_and_nothing_else():
    named = named_in_tree(README)
    assert {path for path in named if not (ROOT / path).exists()} == set(), "named in the tree, but not there"
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    assert files - named == set(), "not named in the tree"


def test_the_tree_is_read_by_its_indents():
    tree = "a/\n  b.py   text\n  c/     d.py: text; e.py: text\n    f.py text\ng/\n"
    readme = f"# Title\n\n## What is where\n\nText.\n\n```\n{tree}```\n"
    assert named_in_tree(readme) == {"a/", "a/b.py", "a/c/", "a/c/d.py", "a/c/e.py", "a/c/f.py", "g/"}


def test_the_readme_is_short():
    assert README.count("\n") <= 220


def test_processes_that_only_answer_load_no_torch():
    """The roll of the replicas, and a task that a node is asked, start with each prediction."""
    assert "torch" not in loaded_after("import unet_ray.ray_backend.replicas, unet_ray.ray_backend.shared_files")
