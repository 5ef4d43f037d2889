"""Write what follows from the registries: the tables in README.md, and the imports in ``pliant/__init__.py`` for type
checkers.

``make generate`` runs it. Tests fail while a file differs from what this script writes; ``tests/test_readme.py`` also
tries each cell of the tables on a small model.
"""

from __future__ import annotations

from pathlib import Path

from pliant.architecture import Architecture, shipped
from pliant.registry import EXPORTS, STEPS, public
from pliant.step import Step, step_class

ROOT = Path(__file__).parent.parent
README, INIT = ROOT / "README.md", ROOT / "src" / "pliant" / "__init__.py"
BEGIN, END = "<!-- written by tools/generate.py -->", "<!-- end of what tools/generate.py writes -->"
DECODERS, HYBRIDS, EXPERTS, ENCODERS = "decoders", "state-space and hybrid decoders", "mixtures of experts", "encoders"
CONVOLUTIONAL = "convolutional networks"
KINDS = (DECODERS, HYBRIDS, EXPERTS, ENCODERS, CONVOLUTIONAL)
YES, NO, LINEAR, DENSE = "yes", "–", "linear layers", "experts not packed"
WEIGHTS = "all weights; LoRA on layers that peft takes"
WITH_PLIANT, AS_BEFORE = "transformers after `import pliant`", "every tool that opened the model before"


def kind_of(architecture: Architecture) -> str:
    """The kind of model that an architecture file describes: by its experts, and by the state that its blocks keep."""
    if any(axis.active for axis in architecture.axes.values()):
        return EXPERTS
    states = {state for block in architecture.blocks for state in block.state}
    return HYBRIDS if states - {"kv"} else DECODERS if states else ENCODERS


def works(step: type[Step], kind: str) -> str:
    """Whether a step works on a kind of model, or on which part of it."""
    if kind in (ENCODERS, CONVOLUTIONAL) and step.needs & {"text", "examples"}:
        return NO  # such a step predicts the text, which takes a causal language model
    if step.family == "values" and kind == CONVOLUTIONAL:
        return LINEAR
    if step.trains and kind == HYBRIDS:
        return WEIGHTS
    return DENSE if step.packs and kind == EXPERTS else YES


def opens(step: type[Step]) -> str:
    """The tools that open the result of a step."""
    return WITH_PLIANT if step.packs or step.family == "pruner" else AS_BEFORE


def reads(step: type[Step]) -> str:
    """The data that a step needs."""
    return "text, examples" if "examples" in step.needs else "text" if "text" in step.needs else "nothing"


def systems() -> list[str]:
    """A row for all steps of which the same is true."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for step in map(step_class, STEPS):
        cells = (reads(step), *(works(step, kind) for kind in KINDS), NO if step.packs else YES, opens(step))
        rows.setdefault(cells, []).append(f"`{step.kind}`")
    columns = ("`--system`", "reads", *KINDS, "GPU", "the result opens in")
    found = [", ".join(names) for names in rows.values()]
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {names} | {' | '.join(cells)} |" for names, cells in zip(found, rows, strict=True)),
    ]


def families() -> list[str]:
    """A row for each kind of model with an architecture file."""
    lines, known = ["| | model types with a file of their own |", "|---|---|"], shipped()
    for kind in KINDS[:-1]:
        names = sorted(name for name, architecture in known.items() if kind_of(architecture) == kind)
        lines.append(f"| {kind} ({len(names)}) | {', '.join(names)} |")
    return lines


def exports() -> list[str]:
    """A line for each format of ``pliant export``."""
    outs = {"gguf": "small.gguf"}
    return [
        f"`pliant export small --to {name} --out {outs.get(name, 'plain')}`: {of.summary}."
        for name, of in EXPORTS.items()
    ]


def readme(page: str) -> str:
    """README with the tables of today between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join("\n".join(lines) for lines in (systems(), exports(), families()))
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def stubs(source: str) -> str:
    """``pliant/__init__.py`` with an import of every public name, which only type checkers and editors read."""
    before, condition, rest = source.partition("if TYPE_CHECKING:\n")
    after = rest[rest.index("\n__version__") :]
    imports = sorted(f"    from {module} import {name} as {name}\n" for name, module in public().items())
    return f"{before}{condition}{''.join(imports)}{after}"


if __name__ == "__main__":
    for path, written in ((README, readme), (INIT, stubs)):
        path.write_text(written(path.read_text("utf-8")), "utf-8")
