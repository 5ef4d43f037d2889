"""Digests stand in recipes, archives and reports: their values must not change between versions."""

import torch

from pliant.checkpoint.fingerprint import fingerprint
from pliant.data import Text
from pliant.data.examples import Example, Examples
from pliant.data.tokenize_examples import Encoded
from pliant.digest import digest, json_digest
from pliant.train.seeds import seed_of


def test_parts_are_joined():
    assert digest(["ab", b"c"]) == digest(["abc"]) == "cf4ab791c62b8d2b2109c90275287816"
    assert digest([], size=8) == "e4a6a0577479b2b4"
    assert json_digest([1, {"a": "ö"}]) == digest(['[1, {"a": "\\u00f6"}]'])


def test_values_are_those_of_the_first_release():
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    assert fingerprint(layer) == "97182a51ba7e9417e8e32191c4dfafaf"
    assert Text(("one", "two"), "here").digest == "d822e87650e83d124990f7f1c5fe72a7"
    assert (
        Examples((Example(text="one"), Example(prompt="a", completion="b")), "here").digest
        == "eb2021ecc5cbfa7c0d40abb7bc2bc13e"
    )
    assert Encoded((torch.tensor([1, 2]),), (torch.tensor([-100, 2]),)).digest == "f214dd819f53caa4165740942e2b10bc"
    assert seed_of("dropout", 3, 5) == 947423781574804913
