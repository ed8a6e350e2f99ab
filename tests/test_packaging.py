"""The folder mapping in pyproject.toml agrees with the disk, and the built wheel holds what the checkout holds."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest

import dit_accel

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELINK = SimpleNamespace(**runpy.run_path(str(ROOT / ".typing" / "relink.py")))
FOLDERS: dict[str, Path] = RELINK.package_folders(ROOT)
TOP = ("dit_accel", "kernels", "pipelines", "eval", "demo")
IMPORT_NAMES = {"flash-attn-4": "flash_attn", "nvidia-cutlass-dsl": "cutlass", "pillow": "PIL", "pyyaml": "yaml"}


def source_files() -> list[Path]:
    return [file for top in TOP for file in sorted((ROOT / top).rglob("*.py"))]


def test_every_package_on_disk_is_declared() -> None:
    on_disk = {file.parent for file in source_files() if file.name == "__init__.py"}
    assert set(FOLDERS.values()) == on_disk


def test_every_module_lies_in_a_package() -> None:
    assert {file.parent for file in source_files()} <= set(FOLDERS.values())


def test_packages_are_named_after_their_folders() -> None:
    for package, folder in FOLDERS.items():
        path = folder.relative_to(ROOT).as_posix().replace("/", ".")
        assert package in (path, f"dit_accel.{path}")


def test_hugging_face_kernels_is_not_shadowed() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    origin = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(ROOT / "kernels") not in origin


def test_no_folder_of_tests_is_importable() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_link_tree_for_type_checkers_is_current() -> None:
    assert RELINK.present_links() == RELINK.wanted_links(ROOT), "Run: python .typing/relink.py"


def test_installed_version_is_the_package_version() -> None:
    assert version("dit-accel") == dit_accel.__version__, "Reinstall: pip install -e ."


def test_data_patterns_match_files() -> None:
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert any(FOLDERS[package].glob(pattern)), f"{pattern} of {package} matches nothing."


def test_third_party_imports_are_declared() -> None:
    project = PYPROJECT["project"]
    requirements = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = [re.split(r"[\s\[<>=!;~]", requirement)[0].lower() for requirement in requirements]
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    imported = set()
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert imported - declared - sys.stdlib_module_names <= {"dit_accel"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built through the source archive, so that nothing left over in build/ can slip in."""
    out = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_exactly_the_checkout(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if not name.endswith("/")}
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    expected = {
        f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for pattern in ["*.py", *patterns.get(package, [])]
        for file in folder.glob(pattern)
        if file.is_file()
    }
    assert {name for name in shipped if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in shipped} == {"dit_accel", f"dit_accel-{dit_accel.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in shipped)


@pytest.mark.slow
def test_wheel_is_the_weights_of_two_embedded_pipelines_and_little_else(wheel: Path) -> None:
    limits = {"shapes": 24e6, "shapes_image": 16e6}
    weights = {
        name: sum(file.stat().st_size for file in (ROOT / "pipelines" / name / "weights").rglob("*.*"))
        for name in limits
    }
    assert all(weights[name] <= limit for name, limit in limits.items())
    assert wheel.stat().st_size < 33e6


@pytest.mark.slow
def test_packages_import_from_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"import importlib as i; print(*(i.import_module(name).__file__ for name in {list(FOLDERS)}), sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.splitlines())
