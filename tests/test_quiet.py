"""Users see no warnings caused by pliant or transformers; names that changed between versions are handled."""

import inspect
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers

import pliant
from pico import DECODERS, IDS, leader, pico, tokenizer
from pliant.anatomy import anatomy_of
from pliant.compat import quiet
from pliant.compat.cache_argument import WORDS, cache_argument
from pliant.elastic import Subnet
from pliant.runtime import library

AT_ONE = """
import sys
import torch, transformers, pliant
transformers.logging.disable_progress_bar()
text, *folders = sys.argv[1:]
for folder in folders:
    model = pliant.load(folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    pliant.inspect(model, self_check="packed" not in folder)
    pliant.evaluate(model, perplexity=text, seqlen=16, windows=1)
    pliant.bench(model, prompt=4, tokens=2, repeats=1)
    ids = torch.tensor([[5, 17, 101, 3]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    if "packed" not in folder:
        pliant.apply(model, pliant.Cut(subnet=pliant.Subnet().without("layers.3.mlp")), progress=False)
    pliant.save(model, folder + "-again")
    model.save_pretrained(folder + "-plain")
    repr(model.config), model.config.to_dict()
print("through")
"""
BY_VERB = """
import sys
from pliant.cli import main
text, folder = sys.argv[1:]
for words in (
    f"inspect {folder}",
    f"evaluate {folder} --perplexity {text} --seqlen 16 --windows 1",
    f"bench {folder} --prompt 4 --tokens 2",
    f"generate {folder} river --tokens 2",
    f"compress {folder} --system magnitude --set sparsity=0.1 --data {text} --windows 1 --no-speed "
    f"--out {folder}-smaller",
):
    sys.argv = ["pliant", *words.split()]
    try:
        main()
    except SystemExit as exit_:
        assert not exit_.code, words
print("through")
"""


def cut(name):
    """A model of which attention is gone in one layer, heads, channels and experts are fewer in another."""
    model = pico(name)
    anatomy = anatomy_of(model)
    subnet = Subnet().without("layers.1.attention")
    for short in (leader(name), "channels", "experts"):
        for axis in (f"layers.2.{kind}.{short}" for kind in ("attention", "mlp", "experts")):
            if axis in anatomy.axes:
                allowed = [units for units in range(1, anatomy.axes[axis].size) if anatomy.axes[axis].allows(units)]
                subnet = subnet.keeping(axis, allowed[-1]) if allowed else subnet
    return pliant.apply(model, pliant.Cut(subnet=subnet), progress=False)


def check_quiet(program, *words):
    command = [sys.executable, "-c", program, *map(str, words)]
    as_a_user = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, env=as_a_user)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert "through" in outcome.stdout
    for word in ("Reading global", "arning", "deprecat"):
        assert word not in outcome.stderr, outcome.stderr


@pytest.mark.slow
def test_cut_models_are_loaded_used_and_saved_without_a_warning(tmp_path, prose):
    folders = [
        tmp_path / name for name in ("llama", "opt", "mixtral")
    ]  # two of them look at their global number of heads
    for folder in folders:
        pliant.save(cut(folder.name), folder, tokenizer=tokenizer())
    check_quiet(AT_ONE, prose, *folders)


@pytest.mark.slow
def test_the_command_line_gives_no_warning_on_a_cut_model(tmp_path, prose):
    pliant.save(cut("opt"), tmp_path / "cut", tokenizer=tokenizer())
    check_quiet(BY_VERB, prose, tmp_path / "cut")


@pytest.mark.skipif(library.library() is None, reason=library.state())
def test_a_packed_model_is_loaded_used_and_saved_without_a_warning(tmp_path, prose):
    model = pliant.apply(pico(), pliant.PackedLinear(format="int8"), progress=False)
    pliant.save(model, tmp_path / "packed", tokenizer=tokenizer())
    check_quiet(AT_ONE, prose, tmp_path / "packed")


def test_transformers_would_warn_of_what_it_reads_itself(tmp_path):
    """Where it no longer does, pliant.compat.quiet can go."""
    cut("opt").save_pretrained(tmp_path)
    seen, logger = [], logging.getLogger(quiet.LOGGER)
    filters, logger.filters = logger.filters, []
    logger.addFilter(lambda record: seen.append(record.getMessage()))
    logging.Logger.warning_once.cache_clear()
    try:
        transformers.AutoConfig.from_pretrained(tmp_path)
    finally:
        logger.filters = filters
    assert seen
    assert all(text.startswith(quiet.MESSAGE) for text in seen)
    quiet.silence()
    assert logger.filters == filters  # once is enough
    record = logging.LogRecord(quiet.LOGGER, logging.WARNING, "", 0, "something else", (), None)
    assert logger.filter(record)


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_is_handed_a_cache_by_a_word_that_it_knows(name):
    model = pico(name)
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=IDS[:1], **cache_argument(model, cache), use_cache=True)
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("word", WORDS)
def test_a_cache_goes_by_the_word_of_the_model(word):
    class Old(torch.nn.Module):
        pass

    exec(f"def forward(self, input_ids, {word}=None): return {word}", namespace := {})
    Old.forward = namespace["forward"]
    assert Old()(1, **cache_argument(Old(), "a cache")) == "a cache"
    assert list(inspect.signature(Old.forward).parameters)[-1] == word


def test_a_model_without_a_cache_is_named():
    with pytest.raises(
        TypeError, match=r"ViTForImageClassification.forward takes no key-value cache: .* cache, past_key_"
    ):
        cache_argument(pico("vit"), None)
