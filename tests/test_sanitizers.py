"""The kernels under the address and undefined-behaviour sanitizers, and what each instruction set's file may
contain."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pliant.runtime import library

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library.library() is None, reason=library.state()),
    pytest.mark.skipif(not all(map(shutil.which, ("cmake", "g++", "objdump"))), reason="no cmake, g++ or objdump"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def make(name, *options):
        folder = tmp_path_factory.mktemp(name)
        subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, capture_output=True)
        return folder

    return make


@pytest.mark.slow
def test_nothing_is_read_or_written_out_of_bounds(build):
    folder = build("sanitized", "-DPLIANT_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Release")
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0,handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PLIANT_LIBRARY": str(folder / "native.so"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_kernels.py",
        "tests/test_cache.py",
    ]
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    assert "skipped" not in outcome.stdout


@pytest.mark.slow
def test_instructions_stay_in_their_files(build):
    """Code for one processor must not leak into what runs on all of them."""
    folder = build("plain", "-DCMAKE_BUILD_TYPE=Release")
    found = {}
    for file in folder.rglob("*.cpp.o"):
        listing = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", file], check=True, capture_output=True, text=True
        )
        found[file.name.removesuffix(".cpp.o")] = listing.stdout
    ymm, zmm, tile = (re.compile(pattern) for pattern in (r"%ymm", r"%zmm", r"\btdp|\btileloadd"))
    assert {name for name, listing in found.items() if ymm.search(listing)} <= {"avx2", "avx512", "amx"}
    assert {name for name, listing in found.items() if zmm.search(listing)} <= {"avx512", "amx"}
    assert {name for name, listing in found.items() if tile.search(listing)} <= {"amx"}
    if "avx2" in found:
        for instruction in ("vpshufb", "pdep", "vfmadd", "vpmaddubsw"):
            assert instruction in found["avx2"]
    if "avx512" in found:
        for instruction in ("vpexpandw", "vpexpandb", "vpdpbusd"):
            assert instruction in found["avx512"]
    if "amx" in found:
        for instruction in ("tdpbf16ps", "tdpb", "tileloadd", "tilerelease"):
            assert instruction in found["amx"]
