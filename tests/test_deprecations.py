"""The suite itself: our own use of a deprecated name fails a test; another package's is listed at the end."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OTHER = """
import contextlib, functools, warnings
import torch
from transformers.utils import logging

def old():
    warnings.warn("old is deprecated", DeprecationWarning, stacklevel=2)

def old_that_names_itself():
    warnings.warn("old is deprecated", FutureWarning)

def renamed(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "old" in kwargs:
            warnings.warn("`old` is deprecated", FutureWarning, stacklevel=2)
        return function(*args, new=kwargs.pop("old", None), **kwargs)
    return wrapper

@renamed
def renamed_argument(new=None):
    return new

class Layer(torch.nn.Module):
    @renamed
    def forward(self, new=None):
        return new

class Output(dict):
    def __getitem__(self, key):
        return super().__getitem__(self._known(key))
    def _known(self, key):
        if key == "old":
            logging.get_logger("transformers.other").warning_once("`old` is deprecated, use `new`")
        return "new"

def swallowing():
    with contextlib.suppress(Exception):
        old()

def with_a_call_back(function):
    with contextlib.suppress(Exception):
        function()
"""
USES = {
    "a name": "other.old()",
    "a name that warns at its own line": "other.old_that_names_itself()",
    "an argument behind a decorator": "other.renamed_argument(old=1)",
    "an argument of a module": "other.Layer()(old=1)",
    "an argument of a module with a hook": (
        "layer = other.Layer(); layer.register_forward_hook(lambda *_: None); layer(old=1)"
    ),
    "a key, only logged": "other.Output(new=1)['old']",
    "a name in a call back whose errors are caught": "other.with_a_call_back(lambda: other.old())",
}
ALWAYS_LISTED = {
    "they alone, where errors are caught": "other.swallowing()",
    "a test that expects it": "pytest.warns(DeprecationWarning, other.old)",
}


@pytest.fixture(scope="module", params=[(), ("-n", "1")], ids=["one process", "a worker"])
def outcome(request, tmp_path_factory):
    """What pytest printed for a project whose tests, ``ours``, and an installed package, ``theirs``, use all of it.

    Returns:
        ``{"ours[0]": "PASSED" …}``, and the list of warnings at the end.
    """
    project = tmp_path_factory.mktemp("project")
    installed = project / "env" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "other.py").write_text(OTHER)
    functions = "".join(f"def use{at}():\n    {use}\n" for at, use in enumerate(USES.values()))
    (installed / "theirs.py").write_text(f"import other\n{functions}")
    tests = [(f"ours_{at}", use) for at, use in enumerate(USES.values())]
    tests += [(f"theirs_{at}", f"theirs.use{at}()") for at in range(len(USES))]
    tests += [(f"listed_{at}", use) for at, use in enumerate(ALWAYS_LISTED.values())]
    tests += [("another", "warnings.warn('something else')")]
    functions = "".join(f"def test_{name}():\n    {use}\n" for name, use in tests)
    (project / "test_it.py").write_text(f"import other, theirs, pytest, warnings\n{functions}")
    kinds = "".join(f"  always::{kind}\n" for kind in ("DeprecationWarning", "FutureWarning"))
    (project / "pytest.ini").write_text(f"[pytest]\nfilterwarnings =\n  error\n{kinds}")
    command = [sys.executable, "-m", "pytest", "-p", "deprecations", "-p", "no:cacheprovider", "-rA", *request.param]
    path = os.pathsep.join(map(str, (installed, TESTS, *filter(None, [os.environ.get("PYTHONPATH")]))))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRANSFORMERS_"))
    } | {"PYTHONPATH": path}
    printed = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False).stdout
    assert re.search(rf"{len(USES) + 1} failed, {len(tests) - len(USES) - 1} passed", printed), printed
    found = re.findall(r"^(PASSED|FAILED) test_it.py::test_(\w+)", printed, re.MULTILINE)
    listed = printed.partition("warnings summary")[2].partition("short test summary")[0]
    return {name: word for word, name in found}, listed


@pytest.mark.slow
@pytest.mark.parametrize("at", range(len(USES)), ids=USES)
def test_our_own_use_is_fatal_and_that_of_another_package_is_listed(outcome, at):
    words, listed = outcome
    assert words[f"ours_{at}"] == "FAILED"
    assert words[f"theirs_{at}"] == "PASSED"
    assert f"test_it.py::test_theirs_{at}\n" in listed


def test_what_they_use_alone_and_what_a_test_expects_is_not_ours(outcome):
    words, listed = outcome
    assert [words[f"listed_{at}"] for at in range(len(ALWAYS_LISTED))] == ["PASSED"] * 2
    assert "test_it.py::test_listed_0\n" in listed
    assert "test_listed_1" not in listed


def test_any_other_warning_is_fatal(outcome):
    words, _ = outcome
    assert words["another"] == "FAILED"
