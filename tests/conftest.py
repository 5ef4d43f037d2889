from __future__ import annotations

import os
import random
import signal
import sys

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for every program that a test starts: see below
import torch
import transformers

import pico
import pliant  # noqa: F401 - registers the per-layer shapes, as any user's program would

pytest_plugins = ["deprecations"]
hypothesis.settings.register_profile(
    "pliant", deadline=None
)  # the first example may import a package, next to other tests
hypothesis.settings.load_profile("pliant")
transformers.logging.set_verbosity_warning()
transformers.logging.disable_default_handler()
transformers.logging.disable_progress_bar()
# a shell starts what it puts in the background deaf to Ctrl-C, and that is inherited
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other, and for the tests beside


def pytest_collection_modifyitems(items):
    """`make unit` takes one family of every layout; the whole matrix is for `make test`."""
    others = set(pico.ARCHITECTURES) - set(pico.LAYOUTS)
    for item in items:
        given = getattr(item, "callspec", None)
        if given is not None and others & {value for value in given.params.values() if isinstance(value, str)}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_process_for_memory(request, monkeypatch):
    """A process of its own for each of two models, to see what memory they take, is for the tests of that."""
    if request.module.__name__ != "test_footprint" and (compress := sys.modules.get("pliant.run.compress")):
        monkeypatch.setattr(compress, "run_memory", lambda *_: None)


@pytest.fixture
def model():
    return pico.pico("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return pico.tokenizer()


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A model folder in the layout of a hub."""
    place = tmp_path / "pico-llama"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    """A text file of 200 short paragraphs."""
    words = [
        "a",
        "small",
        "river",
        "runs",
        "past",
        "the",
        "old",
        "mill",
        "and",
        "turns",
        "its",
        "wheel",
        "while",
        "birds",
        "sing",
        "in",
        "tall",
        "green",
        "trees",
    ]
    drawn = random.Random(0)
    rows = [" ".join(drawn.choices(words, k=14)).capitalize() + "." for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n\n".join(rows), "utf-8")
    return path


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
