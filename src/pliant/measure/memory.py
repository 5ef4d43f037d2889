"""Measure the disk space of a model and the memory of running it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKENS = 32  # generated while memory is measured


def disk_bytes(folder: str | Path) -> int | None:
    """Bytes of the weight files of a model folder; None if the model is not in a folder."""
    files = [file for kind in ("*.safetensors", "*.bin", "*.gguf") for file in Path(folder).glob(kind)]
    return sum(file.stat().st_size for file in files) or None


def run_memory(source: str | Path, dtype: Any = "auto") -> int | None:
    """Peak memory in bytes of a separate process that loads a model and generates a few tokens, without the memory of
    torch, transformers and pliant alone. None if the system does not report it (only Linux does), or the process
    fails."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    task = {"source": str(source), "dtype": str(dtype).removeprefix("torch."), "tokens": TOKENS}
    command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def _resident(key: str) -> int:
    """Bytes in the line ``key`` of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _run(source: str, dtype: str, tokens: int) -> None:
    import torch
    import transformers

    from pliant.checkpoint.load import load

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    ids = torch.ones(1, 4, dtype=torch.long)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    tiny: Any = transformers.LlamaForCausalLM(small)
    tiny.generate(ids, attention_mask=ids, **settings)  # so that lazy imports are not counted
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    model = load(source, dtype=dtype)
    model.generate(ids, attention_mask=ids, **settings)
    print(_resident("VmHWM") - before)  # noqa: T201


if __name__ == "__main__":
    _run(**json.loads(sys.argv[1]))
