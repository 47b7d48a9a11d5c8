"""The layers: what imports what."""

import ast
import subprocess
import sys
from pathlib import Path

import unet_ray

PACKAGE = Path(unet_ray.__file__).parent
LAYERS = [
    {"config"},
    {"storage"},
    {"imaging", "records", "augment", "tiles", "losses", "metrics", "muon", "tracking"},
    {"masks", "models.base", "volumes"},
    {"models.unet", "models.baselines"},
    {"models"},
    {"compiling"},
    {"checkpoint", "rows", "ledger"},
    {"cache", "engine", "imports"},
    {"backends"},
    {"segmenter"},
    {"stages"},
    {"nodes", "process_group"},
    {"datasets"},
    {"exports"},
    {"training", "prediction"},
    {"evaluation"},
    {"folds", "quantization"},
    {"cluster", "progress"},
    {"doctor.words"},
    {"doctor.report"},
    {"doctor.files"},
    {"doctor.pixels"},
    {"doctor.names", "doctor.images", "doctor.masks", "doctor.groups"},
    {"doctor.suggestion"},
    {"doctor"},
    {"api"},
    {"report"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
MAY_IMPORT_RAY = {"nodes", "process_group", "datasets", "training", "prediction", "evaluation", "cluster"}


def imports() -> dict[str, set[str]]:
    """Module below unet_ray -> every module it imports, wherever in the file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name in ("__init__", "recipes"):
            continue
        used = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports are absolute"
                used.add(node.module)
                used.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_every_module_has_a_layer():
    assert set(imports()) == set().union(*LAYERS)


def test_imports_go_down_only():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for name, used in imports().items():
        for other in (u.removeprefix("unet_ray.") for u in used if u.startswith("unet_ray.")):
            if other in level:
                assert level[other] < level[name], f"{name} imports {other}"


def test_only_the_ray_layer_imports_ray():
    for name, used in imports().items():
        if any(module.split(".")[0] == "ray" for module in used):
            assert name in MAY_IMPORT_RAY, f"{name} imports Ray"


def test_training_and_prediction_meet_in_a_model_directory_not_by_import():
    found = imports()
    assert "unet_ray.prediction" not in found["training"]
    assert "unet_ray.training" not in found["prediction"] | found["evaluation"]


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
    assert "scipy" not in loaded_after("import unet_ray.prediction")


def test_what_trains_and_predicts_in_one_process_loads_no_ray():
    assert "ray" not in loaded_after("import unet_ray.engine, unet_ray.stages, unet_ray.training, unet_ray.evaluation")
