"""The import arrows, checked by reading the source: train.py -> aquila_sft -> aquila_kernels -> torch, triton."""

import ast
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_kernels_know_only_torch_and_triton():
    for file in (ROOT / "kernels/aquila_kernels").rglob("*.py"):
        foreign = top(imports(file)) - set(sys.stdlib_module_names) - {"torch", "triton", "aquila_kernels"}
        assert not foreign, f"{file.name} imports {foreign}"


def test_only_train_py_imports_hydra_and_only_swap_knows_the_kernels():
    for file in (ROOT / "aquila_sft").rglob("*.py"):
        names = top(imports(file))
        assert not names & {"hydra", "train", "tests", "kernels", "recipes"}, file
        assert "aquila_kernels" not in names or file.name == "swap.py", file
    assert "hydra" in top(imports(ROOT / "train.py"))


def test_the_library_does_not_import_its_stages():
    for file in (ROOT / "aquila_sft").rglob("*.py"):
        if file.parent.name != "stages":
            assert not any(name.startswith("aquila_sft.stages") for name in imports(file)), file


def test_train_py_stays_under_100_lines():
    assert len((ROOT / "train.py").read_text("utf-8").split("\n")) < 100


def test_kernels_folder_never_becomes_a_package():
    # transformers probes for a package called `kernels`; ours on the path would answer in its place.
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
