"""The threads that share one job: every chunk of every job is done once, however many jobs follow each other how
quickly."""

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "src" / "pliant" / "runtime" / "native"
PROGRAM = """
#include <atomic>
#include <cstdio>

#include "pool.h"

// A thread that comes late for a job must find none of its chunks, nor one of the next: jobs of few and of many
// in turn.
int main() {
  long wrong = 0;
  for (long job = 0; job < 200000; ++job) {
    const int64_t chunks = job % 3 == 0 ? 32 : 2 + job % 3;
    std::atomic<int> times[32] = {};
    pliant::parallel(1 + job % 4, chunks, [&](int64_t i) { times[i].fetch_add(1, std::memory_order_relaxed); });
    for (int64_t i = 0; i < 32; ++i) wrong += times[i] != (i < chunks ? 1 : 0);
  }
  std::printf("%ld", wrong);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_every_chunk_is_done_once(tmp_path):
    (tmp_path / "jobs.cpp").write_text(PROGRAM)
    built = [str(tmp_path / "jobs.cpp"), str(NATIVE / "pool.cpp"), "-o", str(tmp_path / "jobs"), "-pthread"]
    subprocess.run(["g++", "-std=c++17", "-O2", f"-I{NATIVE}", *built], check=True)
    ran = subprocess.run([str(tmp_path / "jobs")], check=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "0"
