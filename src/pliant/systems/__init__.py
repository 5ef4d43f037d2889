"""What ``pliant compress --system`` knows, by name. This table is read without importing any of it.

The published systems are here, one file each; baselines and our own searches are in ``pliant.prune``.
"""

SYSTEMS = {
    "blockpruner": ("pliant.systems.blockpruner", "BlockPruner", "remove whole attention and MLP blocks"),
    "multipruner": (
        "pliant.systems.multipruner",
        "MultiPruner",
        "remove blocks, then MLP channels, then attention heads",
    ),
    "multipruner_evol": (
        "pliant.systems.multipruner_evol",
        "MultiPrunerEvol",
        "remove blocks, then evolve all widths together",
    ),
    "oneshot": ("pliant.prune.oneshot", "OneShot", "rank blocks or layers once and remove the lowest (ShortGPT …)"),
    "unified": ("pliant.prune.unified", "UnifiedPruner", "blocks, channels and heads in one pool, damage per saving"),
    "knapsack": (
        "pliant.prune.knapsack",
        "KnapsackPruner",
        "damage at a few widths, solved as a knapsack, then swaps",
    ),
    "fisher": ("pliant.prune.fisher", "FisherPruner", "narrow what the loss depends on least; no search"),
    "channelpruner": ("pliant.prune.channels", "ChannelPruner", "narrow every layer by importance; needs no data"),
    "sparamx": (
        "pliant.systems.sparamx",
        "SparAMX",
        "run a sparse model on a CPU, weights and cache without their zeros",
    ),
    "magnitude": ("pliant.values.magnitude", "Magnitude", "zero the smallest weights"),
    "rtn": ("pliant.values.rtn", "RTN", "round weights to nearest on a grid of few bits"),
    "packed": (
        "pliant.values.pack",
        "PackedLinear",
        "pack linear layers to bf16, int8 or int4 for pliant's CPU kernels",
    ),
    "recover": ("pliant.train.recover", "Recover", "train what was cut for a while, with or without the dense model"),
}
VALUES = {"sparamx", "magnitude", "rtn", "packed"}  # they change no shape
PRUNERS = set(SYSTEMS) - VALUES - {"recover"}  # they need a ratio
SEARCHES = PRUNERS - {"channelpruner"}  # and these need calibration text
