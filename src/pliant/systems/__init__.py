"""The published systems, one file each. This table is read without importing any of them."""

SYSTEMS = {
    "blockpruner": ("pliant.systems.blockpruner", "BlockPruner", "remove whole attention and MLP blocks"),
    "multipruner": (
        "pliant.systems.multipruner",
        "MultiPruner",
        "remove blocks, then MLP channels, then attention heads",
    ),
}
