"""The metadata of tokenizers in GGUF files. llama.cpp itself is not needed here."""

from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from pliant.errors import ArtefactError
from pliant.exporters.gguf.metadata import metadata_of
from pliant.exporters.gguf.tokenizer import tokenizer_metadata
from pliant.exporters.gguf.writer import _add

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def split(regex, behavior="isolated", invert=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior, invert), last])


def byte_level(pre=GPT2, *, ignore_merges=False, normalizer=None, bos=None, eos="</s>", template=None, added=()):
    rust = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    rust.pre_tokenizer, rust.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        rust.normalizer = normalizer
    rust.train_from_iterator(
        ["the cat and the hat", "then there"],
        trainers.BpeTrainer(
            vocab_size=265,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    rust.add_tokens(list(added))
    if template:
        rust.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token=bos, eos_token=eos)


def sentencepiece(prefix="prepend", merges=None, words=("▁a", "ab", "▁ab"), **settings):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "▁", "a", "b", "c"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if merges is None:
        merges = [
            (word[:end], word[end:])
            for word in words
            for end in range(1, len(word))
            if word[:end] in vocabulary and word[end:] in vocabulary
        ]
    rust = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", **settings))
    if prefix == "prepend":
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False)
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    rust.add_tokens([AddedToken("x▁y", normalized=True)])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def keys(tokenizer, rows=None, ends=()):
    metadata, _ = tokenizer_metadata(tokenizer, rows or len(tokenizer), ends)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (GPT2, False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False, "smollm"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "dbrx"),
        (split(QWEN2), False, "qwen2"),
        (split(QWEN2, "removed", invert=True), False, "qwen2"),
        (split(QWEN35), False, "qwen35"),
        (split(TEKKEN), True, "tekken"),
    ],
)
def test_a_splitting_rule_is_recognised(pre, ignore_merges, name):
    found = keys(byte_level(pre, ignore_merges=ignore_merges))
    assert (found["model"], found["pre"]) == ("gpt2", name)


@pytest.mark.parametrize(
    ("pre", "settings"),
    [
        (split(QWEN2), {"ignore_merges": True}),
        (split(QWEN2 + "|x"), {}),
        (split(QWEN2, "removed"), {}),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]), {}),
        (GPT2, {"normalizer": normalizers.Lowercase()}),
    ],
)
def test_a_splitting_rule_without_a_name_is_refused(pre, settings):
    with pytest.raises(ArtefactError, match="no known name for the way in which this tokenizer splits"):
        keys(byte_level(pre, **settings))


def test_composed_letters_are_noted():
    _, notes = tokenizer_metadata(byte_level(split(QWEN2), normalizer=normalizers.NFC()), 300)
    assert any("NFC" in note for note in notes)


def test_tokens_types_and_merges_of_byte_level_bpe():
    added = [AddedToken("<think>", normalized=False), AddedToken("<|im_end|>", normalized=False)]
    tokenizer = byte_level(added=added)
    found = keys(tokenizer, len(tokenizer) + 2)
    size = len(tokenizer)
    assert found["tokens"][:2] == ["<s>", "</s>"]
    assert found["tokens"][size - 2 :] == ["<think>", "<|im_end|>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert found["token_type"][:3] == [3, 3, 1]
    assert found["token_type"][size - 2 :] == [4, 3, 5, 5]
    assert found["merges"][0] == "h e"
    assert "Ġ the" in found["merges"] or "Ġt he" in found["merges"]
    assert "scores" not in found


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        (None, None, (1, False, False)),  # no beginning: its id is that of the end, and is not added
        (None, "<s>", (0, False, False)),
        ("<s> $A", "<s>", (0, True, False)),
        ("<s> $A", None, (0, True, False)),
        ("<s> $A </s>", "<s>", (0, True, True)),
    ],
)
def test_special_tokens_around_a_text(template, bos, expected):
    found = keys(byte_level(template=template, bos=bos))
    assert (found["bos_token_id"], found["add_bos_token"], found["add_eos_token"]) == expected
    assert found["eos_token_id"] == 1


def test_more_special_tokens_around_a_text_are_noted():
    metadata, notes = tokenizer_metadata(byte_level(template="<s> <s> $A"), 265)
    assert not metadata["tokenizer.ggml.add_bos_token"]
    assert any("puts the tokens [0, 0] before" in note for note in notes)


def test_the_end_of_a_text():
    tokenizer = byte_level(added=[AddedToken("<stop>", special=True), AddedToken("<|im_end|>", special=True)])
    stop, known = tokenizer.convert_tokens_to_ids(["<stop>", "<|im_end|>"])
    assert "eot_token_id" not in keys(tokenizer, ends=[1, known])  # llama.cpp knows it by its text
    assert keys(tokenizer, ends=[1, known, stop])["eot_token_id"] == stop
    _, notes = tokenizer_metadata(tokenizer, len(tokenizer), [stop, 0])
    assert any("does not end a text at '<s>'" in note for note in notes)
    assert keys(byte_level(eos=None), ends=[1])["eos_token_id"] == 1
    with pytest.raises(ArtefactError, match=r"set tokenizer\.eos_token"):
        keys(byte_level(eos=None))


def test_chat_templates():
    tokenizer = byte_level()
    tokenizer.chat_template = "one"
    assert tokenizer_metadata(tokenizer, 265)[0]["tokenizer.chat_template"] == "one"
    tokenizer.chat_template = {"default": "one", "tool-use": "two"}
    metadata, _ = tokenizer_metadata(tokenizer, 265)
    assert metadata["tokenizer.chat_template"] == "one"
    assert metadata["tokenizer.chat_template.tooluse"] == "two"
    assert metadata["tokenizer.chat_templates"] == ["tooluse"]


@pytest.mark.parametrize(
    ("prefix", "space", "notes"), [("prepend", True, 1), ("always", True, 1), ("first", True, 2), ("never", False, 0)]
)
def test_sentencepiece_like_bpe(prefix, space, notes):
    tokenizer = sentencepiece(prefix)
    metadata, said = tokenizer_metadata(tokenizer, len(tokenizer) + 1)
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", space)
    assert len(said) == notes
    tokens, types, scores = found["tokens"], found["token_type"], found["scores"]
    assert types[:4] == [2, 3, 3, 6]
    assert types[-2:] == [4, 5]
    assert tokens[-2:] == ["x y" if prefix == "prepend" else "x▁y", f"[PAD{len(tokenizer)}]"]
    rank = dict(zip(tokens, scores, strict=True))
    assert rank["▁a"] > rank["ab"] > rank["▁ab"] > rank["c"]
    assert rank["<0x0A>"] == 0
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert found["add_bos_token"]


RUNS = ("▁▁", "▁▁▁", "▁▁▁▁")


def test_runs_of_spaces_whose_merges_are_mixed():
    """As transformers converts them: sentencepiece gives all of them the same score."""
    merges = [("▁", "▁"), ("▁", "▁▁"), ("▁", "▁▁▁"), ("▁▁", "▁"), ("▁▁", "▁▁"), ("▁▁▁", "▁")]
    found = keys(sentencepiece(words=RUNS, merges=merges))
    rank = dict(zip(found["tokens"], found["scores"], strict=True))
    assert rank["▁▁"] > rank["▁▁▁"] > rank["▁▁▁▁"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: sentencepiece(
                words=RUNS,
                merges=[("▁▁▁", "▁"), ("▁", "▁"), ("▁▁", "▁"), ("▁▁", "▁▁"), ("▁", "▁▁"), ("▁", "▁▁▁")],
            ),
            "would split . times '▁' in another way",
        ),
        (lambda: sentencepiece(merges=[("▁", "a"), ("a", "b"), ("▁a", "b")]), "would join '▁' and 'ab'"),
        (
            lambda: sentencepiece(merges=[("▁", "a"), ("a", "b"), ("▁a", "b"), ("a", "b"), ("▁", "ab")]),
            "merges into the token",
        ),
        (lambda: sentencepiece(ignore_merges=True), "takes words as tokens without merges"),
        (lambda: byte_level(GPT2, eos=None, added=[AddedToken("Ġ", special=True)]), "says at which token"),
    ],
)
def test_what_llama_cpp_would_join_in_another_way_is_refused(make, reason):
    with pytest.raises(ArtefactError, match=reason):
        keys(make())


def test_other_kinds_are_refused():
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    plain = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    suffix = Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>"))
    prefixed = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    for tokenizer, reason in ((wordpiece, "WordPiece"), (plain, "neither byte-level"), (suffix, "end_of_word_suffix")):
        with pytest.raises(ArtefactError, match=reason):
            tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a"), 10)
    with pytest.raises(ArtefactError, match="add_prefix_space"):
        keys(prefixed)
    with pytest.raises(ArtefactError, match=r"has no tokenizer\.json"):
        tokenizer_metadata(SimpleNamespace(), 10)


def test_tokens_that_take_in_spaces_are_noted():
    _, notes = tokenizer_metadata(byte_level(added=[AddedToken("<mask>", lstrip=True, special=True)]), 300)
    assert any("llama.cpp keeps the spaces around '<mask>'" in note for note in notes)
    _, notes = tokenizer_metadata(sentencepiece("prepend"), 300)
    assert notes == ["this tokenizer finds 'x▁y' only after a space, which it takes in, llama.cpp everywhere"]


def test_a_tokenizer_for_another_embedding_is_refused():
    tokenizer = byte_level(added=[AddedToken("<image>", special=True)])
    size = len(tokenizer)
    _, notes = tokenizer_metadata(tokenizer, size - 1)
    assert any("'<image>'" in note for note in notes)
    with pytest.raises(ArtefactError, match=f"{size - 1} tokens, and the embedding has 200 rows"):
        tokenizer_metadata(tokenizer, 200)


def test_texts_of_tokens_are_unique():
    tokenizer = byte_level(added=[AddedToken("[PAD270]", normalized=False)])
    with pytest.raises(ArtefactError, match="'\\[PAD270\\]' is there twice"):
        keys(tokenizer, 275)


def test_a_model_without_a_tokenizer():
    metadata, notes = tokenizer_metadata(None, 96)
    assert metadata == {"tokenizer.ggml.model": "none", ".vocab_size": 96}
    assert notes == ["the file has no tokenizer"]


def model_in(folder, **settings):
    return SimpleNamespace(
        name_or_path=str(folder), generation_config=GenerationConfig(**settings), config=LlamaConfig(eos_token_id=1)
    )


def test_facts_on_a_model(tmp_path):
    folder = tmp_path / "Tiny-1"
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: my-own\ntags: [a]\n---\n# Tiny\n")
    metadata, _ = metadata_of(model_in(folder, temperature=0.6, top_k=20, eos_token_id=[1, 0]), 265, 1_234_567)
    assert metadata["general.name"] == "Tiny-1"
    assert metadata["general.size_label"] == "1.2M"
    assert metadata["general.license"] == "other"
    assert metadata["general.license.name"] == "my-own"
    assert metadata["general.sampling.temp"] == np.float32(0.6)
    assert metadata["general.sampling.top_k"] == np.int32(20)
    assert metadata["tokenizer.ggml.eot_token_id"] == 0
    assert "general.sampling.top_p" not in metadata


@pytest.mark.parametrize(
    "card", [None, "# no data", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [mit]\n---\n"]
)
def test_a_licence_is_never_invented(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    metadata, notes = metadata_of(model_in(tmp_path), 96, 10)
    assert not [key for key in metadata if "license" in key]
    assert metadata["tokenizer.ggml.model"] == "none"
    assert notes


@pytest.fixture
def incoming(tmp_path):
    path = tmp_path / "in.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "Its own name")
    writer.add_file_type(2)
    writer.add_uint32("llama.block_count", 1)
    writer.add_uint32("llama.context_length", 4096)
    writer.add_uint64("general.base_model.count", 1)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_tensor("token_embd.weight", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_that_came_in_keeps_its_metadata(incoming, tmp_path):
    metadata, notes = metadata_of(SimpleNamespace(name_or_path=str(incoming)), 3, 1000)
    assert not notes
    assert set(metadata) == {
        *(".context_length", "general.name", "general.base_model.count", "general.size_label"),
        *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "add_bos_token")),
        "tokenizer.chat_template",
    }
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b", "[PAD2]"]
    writer = GGUFWriter(None, "deci")
    _add(writer, {f"deci{key}" if key.startswith(".") else key: value for key, value in metadata.items()})
    out = tmp_path / "out.gguf"
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.close()
    before, after = GGUFReader(incoming).fields, GGUFReader(out).fields
    assert after["tokenizer.ggml.token_type"].contents() == [1, 3, 5]
    for name in ("general.base_model.count", "tokenizer.ggml.token_type", "tokenizer.ggml.add_bos_token"):
        assert after[name].types == before[name].types
    assert after["deci.context_length"].types == before["llama.context_length"].types


def test_a_gguf_file_with_more_tokens_than_rows_is_refused(incoming):
    with pytest.raises(ArtefactError, match="has 2 tokens, and the embedding has 1 rows"):
        metadata_of(SimpleNamespace(name_or_path=str(incoming)), 1, 1000)
