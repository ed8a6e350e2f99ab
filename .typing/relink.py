"""Rebuild this folder's link tree, which shows type checkers the package as it is installed.

pyproject.toml maps top-level folders into dit_accel, and mypy and pyright do not run import finders. Run this after
adding a module to dit_accel/ or a package anywhere: ``python .typing/relink.py``. Nothing at run time uses the tree.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def package_folders(root: Path) -> dict[str, Path]:
    """The folder of every declared package, from pyproject.toml."""
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapping: dict[str, str] = setuptools["package-dir"]
    folders = {}
    for package in setuptools["packages"]:
        mapped = max((base for base in mapping if f"{package}.".startswith(f"{base}.")), key=len)
        folders[package] = root.joinpath(mapping[mapped], *package.removeprefix(mapped).strip(".").split("."))
    return folders


def wanted_links(root: Path) -> dict[str, str]:
    """Link path below this folder -> relative target. A folder is linked whole unless packages are mapped into it."""
    folders = package_folders(root)
    parents = {package: package.rpartition(".")[0] for package in folders}
    mapped = [name for name, parent in parents.items() if parent and folders[name].parent != folders[parent]]
    split = {name for name in folders if any(other.startswith(f"{name}.") for other in mapped)}
    sources = {name: folders[name] for name in mapped if name not in split}
    for name in split:
        for entry in folders[name].iterdir():
            is_package = (entry / "__init__.py").exists() and f"{name}.{entry.name}" not in split
            if is_package or entry.suffix in (".py", ".typed"):
                sources[f"{name}.{entry.name}" if is_package else f"{name}/{entry.name}"] = entry
    links = {}
    for name, source in sources.items():
        package, _, file = name.partition("/")
        link = "/".join([*package.split("."), file]).rstrip("/")
        links[link] = os.path.relpath(source, (root / ".typing" / link).parent)
    return dict(sorted(links.items()))


def present_links() -> dict[str, str]:
    """Link path below this folder -> target, as found on disk."""
    found = (path for path in HERE.rglob("*") if path.is_symlink())
    return dict(sorted((path.relative_to(HERE).as_posix(), os.readlink(path)) for path in found))


def relink() -> None:
    """Replace the tree."""
    shutil.rmtree(HERE / "dit_accel", ignore_errors=True)
    for link, target in wanted_links(HERE.parent).items():
        (HERE / link).parent.mkdir(parents=True, exist_ok=True)
        (HERE / link).symlink_to(target)


if __name__ == "__main__":
    relink()
