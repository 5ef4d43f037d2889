"""The constraints files agree with pyproject.toml, and tools/versions.py writes them correctly."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
_spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
versions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(versions)


def number(version):
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


def padded(version):
    return ([*number(version), 0, 0, 0])[:3]


@pytest.mark.parametrize("name", versions.FILES)
def test_every_declared_package_but_torch_is_in_the_file(name):
    """After a change of pyproject.toml: make lock."""
    pins, below = versions.pins(ROOT / name)
    lowest = versions.declared(PROJECT)
    assert not [package for package in pins if versions.OF_TORCH.match(package)]
    assert lowest.keys() - {"torch"} <= pins.keys()
    assert {"pip", "scikit-build-core"} <= pins.keys()
    assert below > (3, 11)  # the Python that the project begins with
    for package in lowest.keys() - {"torch"}:
        exact = name == "constraints-floor.txt"
        assert (
            padded(pins[package]) == padded(lowest[package])
            if exact
            else number(pins[package]) >= number(lowest[package])
        )


def test_what_it_cannot_lock_is_refused():
    project = {
        "project": {"name": "it", "dependencies": ["numpy<3"], "optional-dependencies": {}},
        "build-system": {"requires": []},
    }
    with pytest.raises(ValueError, match="'numpy<3'; only name>=version"):
        versions.declared(project)
    project["project"]["dependencies"] = ["Py_YAML[fast]>=6"]
    project["project"]["optional-dependencies"] = {"more": ["py.yaml>=6", "it[other]"], "other": ["rich>=1.2"]}
    assert versions.declared(project) == {"py-yaml": "6", "rich": "1.2"}
    project["build-system"]["requires"] = ["rich>=2"]
    with pytest.raises(ValueError, match="two lowest versions of rich"):
        versions.declared(project)


def test_the_newest_versions_are_written_for_the_pythons_that_have_wheels(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    asked, minor = [], sys.version_info.minor

    def resolve(requirements):
        asked.extend(requirements)
        return {"numpy==2.0": True, "pip==26.3": True, "from-source==1": False}

    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "_resolve", resolve)
    monkeypatch.setattr(
        versions, "_has_wheels", lambda lines, at: lines == ["numpy==2.0", "pip==26.3"] and at < minor + 2
    )
    versions.lock("constraints-floor.txt", "torch==2.13.0")
    assert {"torch==2.13.0", "transformers==5.14", "pip"} <= set(asked)
    assert not [word for word in asked if word.startswith(("torch>", "torch==2.6"))]
    found, below = versions.pins(tmp_path / "constraints-floor.txt")
    assert found == {"numpy": "2.0", "pip": "26.3", "from-source": "1"}
    assert below == (3, minor + 2)
    assert f"holds for Python 3.{minor} to 3.{minor + 1}" in (tmp_path / "constraints-floor.txt").read_text("utf-8")


def test_what_is_installed_is_compared(tmp_path):
    project = {
        "project": {
            "name": "it",
            "dependencies": ["pytest>=1", "numpy>=1", "not_here>=1"],
            "optional-dependencies": {},
        },
        "build-system": {"requires": []},
    }
    file = tmp_path / "constraints.txt"
    rest = "numpy==0.1{0}\nnot-here==3{0}\n".format(' ; python_version < "3.99"')
    file.write_text(f'# a remark\npytest=={pytest.__version__} ; python_version < "3.99"\n{rest}')
    (said,) = versions.differences(file, project)
    assert re.fullmatch(r"pins numpy to 0\.1, but \S+ is installed", said)
    file.write_text('numpy==0.1 ; python_version < "3.11"\n')
    (said,) = versions.differences(file, project)
    assert said.startswith("applies to Python below 3.11, this is 3.")
    file.write_text("numpy==0.1\n")
    with pytest.raises(ValueError, match=r"'numpy==0\.1'; a line must read name==version"):
        versions.differences(file, project)
