"""Containers: the architectures of llama.cpp that models are written as. A new one is its file and one line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pliant.errors import ArtefactError
from pliant.registry import Entry

if TYPE_CHECKING:
    from pliant.exporters.gguf.plan import Plan

_HERE = "pliant.exporters.gguf.containers"
CONTAINERS: Mapping[str, Entry] = {
    "llama": Entry(f"{_HERE}.llama", "Llama", "Llama and Mistral"),
    "mixtral": Entry(f"{_HERE}.mixtral", "Mixtral", "Mixtral, in files of llama"),
    "qwen2": Entry(f"{_HERE}.qwen2", "Qwen2", "Qwen2"),
    "qwen2moe": Entry(f"{_HERE}.qwen2moe", "Qwen2MoE", "Qwen2 with experts"),
    "qwen3": Entry(f"{_HERE}.qwen3", "Qwen3", "Qwen3"),
    "qwen3moe": Entry(f"{_HERE}.qwen3moe", "Qwen3MoE", "Qwen3 with experts"),
    "gemma": Entry(f"{_HERE}.gemma", "Gemma", "Gemma"),
    "gemma2": Entry(f"{_HERE}.gemma2", "Gemma2", "Gemma 2, by pairs of layers"),
    "gemma3": Entry(f"{_HERE}.gemma3", "Gemma3", "text models of Gemma 3, by periods of 6 layers"),
    "granite": Entry(f"{_HERE}.granite", "Granite", "Granite"),
    "granitemoe": Entry(f"{_HERE}.granitemoe", "GraniteMoE", "Granite with experts"),
    "phi3": Entry(f"{_HERE}.phi3", "Phi3", "Phi 3"),
    "smollm3": Entry(f"{_HERE}.smollm3", "SmolLM3", "SmolLM3, by periods of 4 layers"),
    "olmo2": Entry(f"{_HERE}.olmo2", "OLMo2", "OLMo 2"),
    "olmoe": Entry(f"{_HERE}.olmoe", "OLMoE", "OLMoE"),
    "glm4": Entry(f"{_HERE}.glm4", "GLM4", "GLM 4"),
    "stablelm": Entry(f"{_HERE}.stablelm", "StableLM", "StableLM"),
    "starcoder2": Entry(f"{_HERE}.starcoder2", "StarCoder2", "StarCoder 2"),
    "granitehybrid": Entry(f"{_HERE}.granitehybrid", "GraniteHybrid", "Granite 4 and Bamba"),
    "nemotron_h": Entry(f"{_HERE}.nemotron_h", "NemotronH", "Nemotron H"),
    "mamba": Entry(f"{_HERE}.mamba", "Mamba", "Mamba and Falcon Mamba"),
    "mamba2": Entry(f"{_HERE}.mamba2", "Mamba2", "Mamba 2"),
    "nemotron_h": Entry(f"{_HERE}.nemotron_h", "NemotronH", "Nemotron-H, one block in a layer"),
    "granitehybrid": Entry(f"{_HERE}.granitehybrid", "GraniteHybrid", "Granite 4 and Bamba"),
    "falcon-h1": Entry(f"{_HERE}.falcon_h1", "FalconH1", "Falcon H1"),
    "jamba": Entry(f"{_HERE}.jamba", "Jamba", "Jamba"),
    "lfm2": Entry(f"{_HERE}.lfm2", "LFM2", "LFM2"),
    "lfm2moe": Entry(f"{_HERE}.lfm2moe", "LFM2MoE", "LFM2 with experts"),
    "mamba": Entry(f"{_HERE}.mamba", "Mamba", "Mamba and Falcon Mamba"),
    "mamba2": Entry(f"{_HERE}.mamba2", "Mamba2", "Mamba-2"),
    "qwen3next": Entry(f"{_HERE}.qwen3next", "Qwen3Next", "Qwen3-Next"),
    "qwen35": Entry(f"{_HERE}.qwen35", "Qwen35", "Qwen 3.5"),
    "qwen35moe": Entry(f"{_HERE}.qwen35moe", "Qwen35MoE", "Qwen 3.5 with experts"),
    "deci": Entry(f"{_HERE}.deci", "Deci", "Llama, Mistral, Qwen2, Granite and Phi 3 of uneven layers"),
    "openelm": Entry(f"{_HERE}.openelm", "OpenELM", "Qwen3 of uneven layers, with tied embeddings"),
}
"""Name -> the container. Of two that carry a model, the first is taken: those of uneven layers come last."""


def candidates(model_type: str) -> Iterator[Any]:
    """The containers that carry models of a family, in order of preference."""
    for entry in CONTAINERS.values():
        container = entry.load()
        if model_type in container.models:
            yield container()


def planned(model: Any) -> Plan:
    """The file of a model, in the first container that carries it.

    Raises:
        ArtefactError: none does; the message gives the reason of each.
    """
    from pliant.exporters.gguf.plan import Unfit
    from pliant.exporters.gguf.source import Source

    try:
        source = Source(model)
    except Unfit as reason:
        raise ArtefactError(f"no llama.cpp architecture carries this model: {reason}") from None
    reasons = []
    for container in candidates(source.kind):
        try:
            return container.plan(source)
        except Unfit as reason:
            reasons.append(f"{container.name}: {reason}")
    if not reasons:
        raise ArtefactError(f"no container for {source.kind} models; choose from: {', '.join(families())}")
    raise ArtefactError(f"no llama.cpp architecture carries this model: {'; '.join(reasons)}")


def families() -> list[str]:
    """The model types that some container carries."""
    return sorted({family for entry in CONTAINERS.values() for family in entry.load().models})
