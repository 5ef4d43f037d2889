"""A made-up report in the form that `pliant compress` writes."""

from types import SimpleNamespace

from pliant.prune.removal_record import refits, removals
from pliant.record import to_dict
from pliant.step import Job
from pliant.train.recover import training_sections
from pliant.values.pack import show_packed


def shown(step):
    """A record with what its step shows of it, from its own figures."""
    if "packed" in step:
        job = SimpleNamespace(record={**step})
        job.show = lambda *sections, **others: Job.show(job, *sections, **others)
        show_packed(job)
        return job.record
    sections = removals(step.get("points", []), step.get("counters", {})) + refits(step.get("repair", []))
    if "recovery" in step:
        sections += training_sections(step["recovery"])
    return {**step, "sections": [to_dict(section) for section in sections]}


def removal(stage, unit, loss, ratio, perplexity=None):
    return {
        "stage": stage,
        "unit": unit,
        "loss": loss,
        "score": loss if perplexity is None else perplexity,
        "label": "calibration perplexity",
        "ratio": ratio,
        "parameters": 1000,
        "macs": 900,
    }


def quality(perplexity, acc):
    row = {"perplexity": perplexity, "loss": 2.5, "stderr": 0.1, "windows": 8, "seqlen": 64}
    task = {"acc": acc, "acc_norm": acc + 0.01, "stderr": 0.02, "questions": 50}
    return {"perplexity": {"held-out.txt": row}, "tasks": {"arc": task}}


def costs(parameters, quality):
    return {
        "parameters": parameters,
        "macs_per_token": parameters,
        "weight_bytes": 4 * parameters,
        "streamed_bytes": 4 * parameters,
        "cache_bytes_per_token": parameters // 100,
        "quality": quality,
    }


def _counters(steps):
    return {
        "steps": steps,
        "scores": 40,
        "evaluations": 30,
        "replayed": 10,
        "block_forwards": 1234.0,
        "seconds": 75.0,
        "windows": [8, 64],
    }


STEP = shown(
    {
        "settings": {"step": "multipruner", "ratio": 0.2, "split": "44:52:4", "mlp_group": None},
        "data": {"source": "prose.txt", "rows": 200, "hash": "abc"},
        "parameters_before": 2_000_000,
        "parameters_after": 1_600_000,
        "seconds": 95.2,
        "peak_memory": 538060032,
        "points": [
            removal("blocks", "layers.2.attention", 2.6, 0.08, 13.463),
            removal("blocks", "layers.1.mlp", 2.7, 0.15, 14.879),
            removal("mlp channels", "layers.0.mlp.channels", 2.8, 0.2, 16.444),
        ],
        "counters": {"blocks": _counters(2), "mlp channels": _counters(1)},
    }
)

PACKED = shown(
    {
        "settings": {"step": "packed", "format": "int4"},
        "data": None,
        "parameters_before": 1_600_000,
        "parameters_after": 1_600_000,
        "seconds": 0.4,
        "peak_memory": 538060032,
        "packed": {
            "lm_head": {"format": "int8"},
            "layers.0.up": {"format": "int4"},
            "layers.0.down": {"format": "int4"},
        },
        "bits": 4.375,
        "native": False,
        "why_not_native": "its norm is Odd<Norm>",
        "left": {
            "parameters": 400_000,
            "bytes": 1_600_000,
            "share": 0.25,
            "reasons": [
                {"why": "embeddings", "parameters": 399_000, "bytes": 1_596_000, "names": ["embed"]},
                {"why": "norms, biases and other vectors", "parameters": 1_000, "bytes": 4_000, "names": []},
            ],
        },
    }
)

REPORT = {
    "schema": 1,
    "model": "models/pico",
    "ratio": 0.2,
    "before": costs(2_000_000, quality(12.5, 0.5)),
    "after": costs(1_600_000, quality(16.789, 0.44)),
    "layers": {
        f"layers.{layer}.{kind}": kept
        for layer, attention, mlp in [(0, 1.0, 0.75), (1, 1.0, 0.0), (2, 0.0, 1.0), (3, 1.0, 1.0)]
        for kind, kept in [("attention.kv", attention), ("mlp.channels", mlp)]
    },
    "steps": [STEP],
    "machine": {"cpu": "Some CPU", "cores": 2, "threads": 2, "system": "Linux"},
    "device": "cpu",
    "dtype": "float32",
    "versions": {"pliant": "0.1.0", "torch": "2.13.0"},
}


def _rate(median):
    return {"median": median, "p10": median * 0.9, "p90": median * 1.1}


def with_speed():
    return REPORT | {
        "speed": {
            "model": {"prefill": _rate(240.0), "decode": _rate(52.0)},
            "against": {"prefill": _rate(200.0), "decode": _rate(40.0)},
            "speedup": {"prefill": _rate(1.2), "decode": _rate(1.3)},
            "settings": {"prompt": 256, "tokens": 32, "batch": 1, "repeats": 5},
            "threads": 2,
            "peak_memory": 538060032,
        },
        "predicted": {"prefill": 1.27, "decode": 1.23},
    }
