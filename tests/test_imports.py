"""The import arrows of docs/design.md, read from the source, and what a bare import loads."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).parents[1]
FOLDERS: dict[str, Path] = runpy.run_path(str(ROOT / ".typing" / "relink.py"))["package_folders"](ROOT)
MODULES = {
    package if file.stem == "__init__" else f"{package}.{file.stem}": file
    for package, folder in FOLDERS.items()
    for file in sorted(folder.glob("*.py"))
}
ROOMS = (  # from the top: a room imports from itself and from those below it
    ("dit_accel.cli", "dit_accel.commands", "dit_accel.demo", "dit_accel.explanation"),
    ("dit_accel.tuning",),
    ("dit_accel.eval",),
    ("dit_accel.plugin", "dit_accel.attach", "dit_accel.runtime", "dit_accel.plan_file", "dit_accel.tuned_plan"),
    ("dit_accel.pipelines",),
    ("dit_accel.interception", "dit_accel.legacy_processors", "dit_accel.state"),
    ("dit_accel.methods",),
    ("dit_accel.layout", "dit_accel.marks", "dit_accel.plan"),
    ("dit_accel.kernels",),
)
MODEL_SIDE = sum(ROOMS[3:6], ())  # from plugin down to interception
MODEL_LIBRARIES = ("accelerate", "diffusers", "transformers")
KERNEL_LIBRARIES = {"torch", "triton", "dit_accel"}
DEMO_LIBRARIES = {"gradio", "starlette"}
OPTIONAL = {"cutlass", "flash_attn", "matplotlib", "skimage", "torchmetrics", "xformers"} | DEMO_LIBRARIES
DIFFUSERS_INTERNALS = {"_AttentionBackendRegistry", "_active_backend", "_attention_backend", "_parallel_config"}
HEAVY = {"torch", "diffusers", "transformers", "triton", "numpy", "PIL"} | OPTIONAL


@dataclass(frozen=True)
class Import:
    target: str  # dotted name of the module or of what is taken from it
    line: int
    deferred: bool  # inside a function, or for type checkers only


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text())
    deferred = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef) or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.dump(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno, id(node) in deferred) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(f"{module}.{name.name}", node.lineno, id(node) in deferred) for name in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def room(name: str) -> int:
    """Level from the top; dit_accel itself, with the public names it loads on use, is at the top."""
    return next((level for level, packages in enumerate(ROOMS) if within(name, packages)), 0)


each_module = pytest.mark.parametrize(("name", "file"), MODULES.items(), ids=MODULES)


@each_module
def test_module_belongs_to_a_room(name: str, file: Path) -> None:
    rooms = [packages for packages in ROOMS if within(name, packages)]
    assert name == "dit_accel" or len(rooms) == 1, f"{name} is in no room of ROOMS: say which modules it may import."


@each_module
def test_imports_are_absolute(name: str, file: Path) -> None:
    assert [found for found in imports_of(file) if found.target.startswith(".")] == []


@each_module
def test_arrows_point_downwards(name: str, file: Path) -> None:
    ours = [found for found in imports_of(file) if within(found.target, ("dit_accel",))]
    above = room(name)
    upward = [found for found in ours if found.target != "dit_accel.__version__" and room(found.target) < above]
    assert upward == []


@each_module
def test_optional_packages_load_on_use(name: str, file: Path) -> None:
    """The demo, which nothing loads before it is asked for, is the one place that needs its package at once."""
    lazy = OPTIONAL - DEMO_LIBRARIES if within(name, ("dit_accel.demo",)) else OPTIONAL
    eager = [found for found in imports_of(file) if found.target.split(".")[0] in lazy and not found.deferred]
    assert eager == []


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, ("dit_accel.demo",))])
def test_the_demo_loads_on_use(name: str) -> None:
    taken = [found for found in imports_of(MODULES[name]) if within(found.target, ("dit_accel.demo",))]
    assert all(found.deferred for found in taken)
    assert not taken or name == "dit_accel.commands.demo"


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("dit_accel.eval",))])
def test_eval_knows_no_model(name: str) -> None:
    assert [found for found in imports_of(MODULES[name]) if within(found.target, MODEL_SIDE + MODEL_LIBRARIES)] == []


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("dit_accel.kernels",))])
def test_kernels_need_torch_and_triton_only(name: str) -> None:
    allowed = KERNEL_LIBRARIES | sys.stdlib_module_names
    foreign = [found for found in imports_of(MODULES[name]) if found.target.split(".")[0] not in allowed | OPTIONAL]
    assert foreign == []


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) != room("dit_accel.interception")])
def test_diffusers_internals_stay_in_one_place(name: str) -> None:
    taken = [found.target for found in imports_of(MODULES[name]) if within(found.target, ("diffusers",))]
    assert [target for target in taken if "._" in target or within(target, ("diffusers.hooks",))] == []
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text())))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert names & DIFFUSERS_INTERNALS == set()


def test_reader_sees_nested_and_aliased_imports(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("import a.b as c\nfrom . import d\ndef f():\n    from e.g import h\n")
    assert list(imports_of(file)) == [Import("a.b", 1, False), Import("..d", 2, False), Import("e.g.h", 4, True)]


@pytest.mark.parametrize("module", ["dit_accel", "dit_accel.cli"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert module in loaded
    assert HEAVY.isdisjoint(loaded)


def test_no_module_hides_a_public_name() -> None:
    """Importing a submodule sets it as an attribute of the package, in place of a function of that name."""
    names = {name.removeprefix("dit_accel.").split(".")[0] for name in MODULES}
    assert not names.intersection(dit_accel.__all__)
