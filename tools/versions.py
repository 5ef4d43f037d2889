"""Exact versions of everything that pip installs, written from what ``pyproject.toml`` declares.

``make lock`` runs it with the pip of a fresh environment and writes two files of constraints::

    constraints.txt         the newest versions that go together: make demo, make test
    constraints-floor.txt   every declared package at its lowest declared version: make test-floor

torch is in neither, nor are the CUDA packages that come with it: it is the caller's, ``TORCH`` in the Makefile. The lines hold for
those versions of Python only for which everything that comes as a wheel here does so there: a newer Python does without them,
instead of compiling what was never meant for it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {"constraints.txt": ">=", "constraints-floor.txt": "=="}
TOOLS = ("pip", "cmake", "ninja")  # what builds the kernels, where the machine has none, and what installs all of it
OF_TORCH = re.compile(r"torch|triton|nvidia|cuda")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?>=(?P<lowest>[\w.]+)")
_PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+) ; python_version < \"(?P<below>3\.\d+)\"")


def declared(project: dict) -> dict[str, str]:
    """The lowest version of every package that the project, its extras or its build names, by normal name.

    Raises:
        ValueError: a requirement that is not ``name>=version``.
    """
    own = project["project"]
    listed = [*own["dependencies"], *project["build-system"]["requires"]]
    for extra in own["optional-dependencies"].values():
        listed += extra
    lowest = {}
    for text in listed:
        found = _REQUIREMENT.fullmatch(text)
        if text.startswith(f"{own['name']}["):  # an extra that takes in others
            continue
        if found is None:
            raise ValueError(f"pyproject.toml asks for {text!r}; only name>=version can be locked")
        lowest.setdefault(normal(found["name"]), found["lowest"])
        if lowest[normal(found["name"])] != found["lowest"]:
            raise ValueError(f"pyproject.toml names two lowest versions of {found['name']}")
    return lowest


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """The versions in a file of constraints, by normal name, and the first Python for which they do not hold."""
    versions, below = {}, set()
    for line in path.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            found = _PIN.fullmatch(line)
            if found is None:
                raise ValueError(
                    f"{path.name} has the line {line!r}; it is name==version with the Pythons it holds for"
                )
            versions[normal(found["name"])] = found["version"]
            below.add(found["below"])
    (last,) = below
    return versions, (3, int(last.removeprefix("3.")))


def lock(name: str, torch: str) -> None:
    """Write one file of constraints.

    Arguments:
        torch: what pip is to install as torch, so that all others go with it.
    """
    lowest = declared(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8")))
    lowest.pop("torch")
    wanted = [f"{package}{FILES[name]}{version}" for package, version in lowest.items()]
    found = _resolve([*torch.split(), *wanted, *TOOLS])
    minor = first = sys.version_info.minor
    while _has_wheels([line for line, wheel in found.items() if wheel], minor):
        minor += 1
    if minor == first:
        raise SystemExit(f"{name}: pip finds its own choice no longer; run it again")
    lines = sorted(found)
    held = f"3.{first}" if minor == first + 1 else f"3.{first} to 3.{minor - 1}"
    head = f"# Written by `make lock` with Python 3.{first}; holds for Python {held}. torch is not in it: see the Makefile.\n"
    text = head + "".join(f'{line} ; python_version < "3.{minor}"\n' for line in lines)
    aside = ROOT / f"{name}.new"
    aside.write_text(text, "utf-8")
    aside.replace(ROOT / name)
    print(f"{name}: {len(lines)} versions, Python {held}")


def _resolve(requirements: Sequence[str]) -> dict[str, bool]:
    """What pip would install beside torch, as ``name==version``, and whether that comes as a wheel."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip("--ignore-installed", "--report", str(report), *requirements, check=True)
        found = json.loads(report.read_text("utf-8"))
    return {
        f"{normal(item['metadata']['name'])}=={item['metadata']['version']}": item["download_info"]["url"].endswith(
            ".whl"
        )
        for item in found["install"]
        if not OF_TORCH.match(item["metadata"]["name"])
    }


def _has_wheels(lines: Sequence[str], minor: int) -> bool:
    """Whether all these versions can be had as wheels for a Python."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-deps", "--only-binary=:all:", "--python-version", f"3.{minor}", "--target", folder)
        return _pip(*options, *lines, check=False) == 0


def _pip(*arguments: str, check: bool) -> int:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *arguments]
    errors = None if check else subprocess.DEVNULL
    return subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=errors).returncode


def differences(path: Path, project: dict) -> list[str]:
    """What is installed of the packages that a project names in another version than a file of constraints says."""
    versions, below = pins(path)
    if sys.version_info[:2] >= below:
        here = ".".join(map(str, sys.version_info[:2]))
        return [f"holds for Python below {below[0]}.{below[1]}, this is {here}: pip chose versions of its own"]
    told = []
    for package in declared(project):
        if package not in versions:
            continue
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found != versions[package]:
            told.append(f"has {package} {versions[package]}, installed is {found}")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("lock", help="write the two files")
    verbs.add_parser("check", help="compare what is installed with a file").add_argument("file", type=Path)
    given = parser.parse_args()
    if given.verb == "lock":
        for name in FILES:
            lock(name, os.environ.get("TORCH", ""))
        return 0
    told = differences(given.file, tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8")))
    for line in told:
        print(f"{given.file.name} {line}")
    return min(len(told), 1)


if __name__ == "__main__":
    sys.exit(main())
