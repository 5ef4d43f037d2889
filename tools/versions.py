"""Exact versions of everything that pip installs, written from what ``pyproject.toml`` declares.

``make lock`` runs it with the pip of a fresh environment and writes two files of constraints::

    constraints.txt         the newest versions that go together: make demo, make test
    constraints-floor.txt   every declared package at its lowest declared version: make test-floor

Neither file has torch or its CUDA packages: the caller chooses torch, by ``TORCH`` in the Makefile. The pins apply only
to the Python versions for which every package that is a wheel here also has a wheel. A newer Python ignores them,
instead of compiling versions that do not support it.
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
TOOLS = ("pip", "cmake", "ninja")  # the installer, and the build tools for machines that lack them
OF_TORCH = re.compile(r"torch|triton|nvidia|cuda")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?>=(?P<lowest>[\w.]+)")
_PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+) ; python_version < \"(?P<below>3\.\d+)\"")


def declared(project: dict) -> dict[str, str]:
    """The lowest version of every package that the project, its extras or its build requires, by normalised name.

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
        if text.startswith(f"{own['name']}["):  # an extra that includes others
            continue
        if found is None:
            raise ValueError(f"pyproject.toml requires {text!r}; only name>=version can be locked")
        lowest.setdefault(normal(found["name"]), found["lowest"])
        if lowest[normal(found["name"])] != found["lowest"]:
            raise ValueError(f"pyproject.toml declares two lowest versions of {found['name']}; make them equal")
    return lowest


def normal(name: str) -> str:
    """A package's normalised name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """The versions in a constraints file, by normalised name, and the first Python version that they do not apply
    to."""
    versions, below = {}, set()
    for line in path.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            found = _PIN.fullmatch(line)
            if found is None:
                raise ValueError(
                    f'{path.name} has the line {line!r}; a line must read name==version ; python_version < "3.x"'
                )
            versions[normal(found["name"])] = found["version"]
            below.add(found["below"])
    (last,) = below
    return versions, (3, int(last.removeprefix("3.")))


def lock(name: str, torch: str) -> None:
    """Write one file of constraints.

    Arguments:
        torch: the torch requirement that the other versions must be compatible with.
    """
    lowest = declared(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8")))
    lowest.pop("torch")
    wanted = [f"{package}{FILES[name]}{version}" for package, version in lowest.items()]
    found = _resolve([*torch.split(), *wanted, *TOOLS])
    minor = first = sys.version_info.minor
    while _has_wheels([line for line, wheel in found.items() if wheel], minor):
        minor += 1
    if minor == first:
        raise SystemExit(f"{name}: pip no longer finds the versions it just chose; run it again")
    lines = sorted(found)
    held = f"3.{first}" if minor == first + 1 else f"3.{first} to 3.{minor - 1}"
    head = f"# Written by `make lock` with Python 3.{first}; holds for Python {held}."
    head += " torch is not in it: see the Makefile.\n"
    text = head + "".join(f'{line} ; python_version < "3.{minor}"\n' for line in lines)
    aside = ROOT / f"{name}.new"
    aside.write_text(text, "utf-8")
    aside.replace(ROOT / name)
    print(f"{name}: {len(lines)} versions, Python {held}")


def _resolve(requirements: Sequence[str]) -> dict[str, bool]:
    """The packages that pip would install besides torch: ``name==version`` -> whether it is a wheel."""
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
    """Whether all these versions have wheels for Python 3.``minor``."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-deps", "--only-binary=:all:", "--python-version", f"3.{minor}", "--target", folder)
        return _pip(*options, *lines, check=False) == 0


def _pip(*arguments: str, check: bool) -> int:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *arguments]
    errors = None if check else subprocess.DEVNULL
    return subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=errors).returncode


def differences(path: Path, project: dict) -> list[str]:
    """One sentence for each required package whose installed version differs from the constraints file."""
    versions, below = pins(path)
    if sys.version_info[:2] >= below:
        here = ".".join(map(str, sys.version_info[:2]))
        return [f"applies to Python below {below[0]}.{below[1]}, this is {here}: pip chose the versions itself"]
    lines = []
    for package in declared(project):
        if package not in versions:
            continue
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found != versions[package]:
            lines.append(f"pins {package} to {versions[package]}, but {found} is installed")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("lock", help="write both constraints files")
    verbs.add_parser("check", help="compare the installed versions with a constraints file").add_argument(
        "file", type=Path
    )
    given = parser.parse_args()
    if given.verb == "lock":
        for name in FILES:
            lock(name, os.environ.get("TORCH", ""))
        return 0
    lines = differences(given.file, tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8")))
    for line in lines:
        print(f"{given.file.name} {line}")
    return min(len(lines), 1)


if __name__ == "__main__":
    sys.exit(main())
