"""What a wheel holds, and that the lists it is made from agree with the tree."""

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
PAGES = ("*.css", "*.jinja", "*.js")
SETUPTOOLS = importlib.metadata.version("setuptools")


def packages_in_the_tree() -> list[str]:
    folders = [file.parent for file in (ROOT / "kseg").rglob("__init__.py")]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    inside = [file.parent for file in (ROOT / "export").rglob("__init__.py")]
    return sorted(names + [".".join(("kseg", *f.relative_to(ROOT).parts)) for f in inside])


def test_package_list_matches_the_tree():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_the_tree()


def test_every_folder_of_python_files_is_a_package():
    for top in ("kseg", "export"):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), file


def test_export_is_mapped_below_kseg():
    assert PROJECT["tool"]["setuptools"]["package-dir"]["kseg.export"] == "export"
    package = importlib.import_module("kseg.export")
    assert Path(package.__file__).parent.name in ("export", "kseg")


def test_requirements_are_plain_ranges():
    # setuptools reads this file for the metadata: an option or a file in it breaks the build.
    for line in REQUIREMENTS:
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*(\[[\w,-]+\])?((>=|<|!=)[\w.*]+,?)+", line), line


def test_requirements_name_a_package_once():
    names = [re.split(r"[\[<>!=]", line)[0].lower().replace("_", "-") for line in REQUIREMENTS]
    assert len(names) == len(set(names))


def test_entry_point_is_a_function():
    module, _, name = PROJECT["project"]["scripts"]["kseg"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_version_is_the_one_that_is_installed():
    import kseg

    assert importlib.metadata.version("kseg") == kseg.__version__


@pytest.mark.skipif(
    int(SETUPTOOLS.split(".")[0]) < 77,
    reason=f"setuptools {SETUPTOOLS} cannot read our pyproject.toml; pip install 'setuptools>=77'",
)
def test_wheel_holds_kseg_alone(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    # A copy, because setuptools leaves build/ and kseg.egg-info/ in the folder it builds.
    names = ["pyproject.toml", "requirements.txt", "README.md", "LICENSE"]
    source.mkdir()
    for name in names:
        shutil.copy(ROOT / name, source)
    for name in ("kseg", "export", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-q", "-w", str(target), str(source)], check=True)
    (wheel,) = target.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (metadata,) = [name for name in held if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    code = {name for name in held if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in code} == {"kseg"}
    assert code == expected_files()
    for line in REQUIREMENTS:
        name = re.split(r"[\[<>!=]", line)[0]
        assert f"Requires-Dist: {name}" in text


def expected_files() -> set[str]:
    kseg = [file.relative_to(ROOT) for file in (ROOT / "kseg").rglob("*.py")]
    kseg += [file.relative_to(ROOT) for file in (ROOT / "kseg" / "recipes").glob("*.toml")]
    kseg += [path.relative_to(ROOT) for kind in PAGES for path in (ROOT / "kseg").rglob(kind)]
    kseg.append(Path("kseg/models/table.json"))
    export = [Path("kseg") / file.relative_to(ROOT) for file in (ROOT / "export").rglob("*.py")]
    export.append(Path("kseg/export/certificate.html.jinja"))
    return {file.as_posix() for file in (*kseg, *export)}
