"""The wheel, installed into an empty place with the repository out of reach."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("stabilitylab", "probes", "reports", "setup.cfg", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def tree_packages() -> set[str]:
    """Every folder with an __init__.py, under the name that it is installed as."""
    found = set()
    for root, prefix in (("stabilitylab", []), ("probes", ["stabilitylab"]), ("reports", ["stabilitylab"])):
        for path in (ROOT / root).rglob("__init__.py"):
            found.add(".".join([*prefix, *path.parent.relative_to(ROOT).parts]))
    return found


def listed_packages() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options"]["packages"].split())


def test_setup_cfg_lists_every_package_by_hand() -> None:
    assert listed_packages() == tree_packages()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that a stale build/ of the working tree has no say, and by way of an sdist: what that lacks
    can't be built.
    """
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run_installed(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` where only the installed wheel and the dependencies can be imported.

    -S leaves out site-packages' .pth files, and with them the editable install of the working tree.
    """
    dependencies = sysconfig.get_path("purelib")
    prologue = f"import sys; sys.path[:0] = [{str(installed)!r}]; sys.path.append({dependencies!r})\n"
    command = [sys.executable, "-I", "-S", "-c", prologue + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=installed)


def test_every_module_imports_from_the_wheel(installed: Path) -> None:
    code = f"""
import importlib, pkgutil, stabilitylab
from pathlib import Path
assert Path(stabilitylab.__file__).is_relative_to({str(installed)!r}), stabilitylab.__file__
modules = pkgutil.walk_packages(stabilitylab.__path__, "stabilitylab.")
names = [module.name for module in modules if not module.name.endswith("__main__")]
for name in names:
    found = importlib.import_module(name).__file__
    assert Path(found).is_relative_to({str(installed)!r}), found
packages = {{name for name in names if hasattr(importlib.import_module(name), "__path__")}}
assert packages | {{"stabilitylab"}} == set({sorted(tree_packages())!r}), packages
print(len(names))
"""
    done = run_installed(installed, code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_no_generic_name_is_installed(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"stabilitylab", "bin"}


def test_package_data_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    texts = ("stabilitylab/testbed/texts/prose.txt", "stabilitylab/testbed/texts/canary.txt")
    paper = "stabilitylab/reports/paper.mplstyle"
    tab = "stabilitylab/reports/tensorboard_plugin/static/index.js"
    for wanted in ("stabilitylab/py.typed", "stabilitylab/reports/templates/report.html.j2", paper, tab, *texts):
        assert wanted in names
    checkpoints = [name for name in names if name.startswith("stabilitylab/testbed/checkpoints/")]
    assert sorted(Path(name).name for name in checkpoints) == [
        "blip2_digits.safetensors",
        "malmen.safetensors",
        "mend.safetensors",
    ]
    sources = {f"stabilitylab/probes/native/{path.name}" for path in (ROOT / "probes" / "native").iterdir()}
    assert sources
    assert sources <= set(names)
    assert not [name for name in names if name.startswith(("probes/", "reports/", "tests/", "benchmarks/"))]
    assert not [name for name in names if "/zoo/" in name]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the wheel sweeps weights in NumPy")
def test_the_wheel_is_for_this_platform_and_sweeps_weights_in_native_code(wheel: Path, installed: Path) -> None:
    assert "-abi3-" in wheel.name
    code = "from stabilitylab.probes.native_scan import weight_pass; print(weight_pass())"
    done = run_installed(installed, code)
    assert done.stdout.strip() == "native", done.stderr


def test_the_console_script_answers(installed: Path) -> None:
    """The script itself, with -S for the same reason; -I would leave out PYTHONPATH, its only way to the wheel."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), sysconfig.get_path("purelib")])}
    script = [sys.executable, "-S", str(installed / "bin" / "stabilitylab"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=installed, env=environment)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "check", "report"):
        assert command in done.stdout
