"""The house: folders, and imports that go down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unet_ray

PACKAGE = Path(unet_ray.__file__).parent
ORDER = [
    "__main__",
    "cli",
    "demo",
    "doctor",
    "report",
    "api",
    "evaluation",
    "training",
    "inference",
    "ray_backend",
    "models",
    "metrics",
    "data",
    "settings",
    "config",
    "registry",
]
"""The folders and files of the package from top to bottom: each imports from itself and from what stands below."""
APART = [{"training", "inference"}]
"""Neighbours that never import each other: they meet in a model directory."""


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, wherever in the file; all dotted, without `unet_ray.`."""
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name == "__init__":  # loads what is asked for, when it is asked for
            continue
        used = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports are absolute"
                used.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def upward(package: Path) -> list[str]:
    """Imports that break the order, as `importer -> imported`."""
    level = {name: number for number, name in enumerate(ORDER)}
    wrong = []
    for module, used in imports(package).items():
        for other in {room(u.removeprefix("unet_ray.")) for u in used if u.startswith("unet_ray.")} & set(level):
            here = room(module)
            if level[other] < level[here] or any({here, other} == pair for pair in APART):
                wrong.append(f"{module} -> {other}")
    return sorted(wrong)


def test_every_folder_and_file_has_its_place():
    assert {room(module) for module in imports(PACKAGE)} - {"recipes"} == set(ORDER)


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
    users = {module for module, used in imports(PACKAGE).items() if any(room(name) == "ray" for name in used)}
    assert {room(module) for module in users} == {"ray_backend"}


def test_no_folder_imports_its_own_files_in_a_circle():
    graph = {
        module: {u.removeprefix("unet_ray.") for u in used if u.startswith("unet_ray.")}
        for module, used in imports(PACKAGE).items()
    }
    graph = {module: used & set(graph) - {module, room(module)} for module, used in graph.items()}
    while leaves := {module for module, used in graph.items() if not used}:
        graph = {module: used - leaves for module, used in graph.items() if module not in leaves}
    assert graph == {}


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_the_package_and_the_help_load_neither_torch_nor_ray():
    assert not {"torch", "ray", "numpy", "pyarrow"} & loaded_after("import unet_ray")
    assert not {"torch", "ray", "numpy", "pyarrow"} & loaded_after("import unet_ray.cli")


def test_prediction_starts_without_scipy_which_takes_longer_than_all_of_ours():
    assert "scipy" not in loaded_after("import unet_ray.inference.predict")


def test_what_trains_and_predicts_in_one_process_loads_no_ray():
    modules = "unet_ray.training.run, unet_ray.inference.predict, unet_ray.evaluation.evaluate"
    assert "ray" not in loaded_after(f"import {modules}")
