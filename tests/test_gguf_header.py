"""GGUF files from elsewhere are checked before any reader that trusts them opens them."""

import struct
import time
from contextlib import suppress

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import pliant
from pliant.checkpoint.gguf_header import check_gguf
from pliant.errors import ArtefactError

MAGIC = b"GGUF" + struct.pack("<I", 3)


def written(path, change=None, architecture="llama"):
    writer = GGUFWriter(path, architecture)
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.0])
    if change:
        change(writer)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 18), np.uint8), raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def string_key(name, value):
    return text(name) + struct.pack("<I", 8) + text(value)


ARCHITECTURE = string_key("general.architecture", "llama")


def hand_made(path, keys=(ARCHITECTURE,), tensors=(), data=b"", counts=None):
    tensor_count, key_count = counts or (len(tensors), len(keys))
    body = MAGIC + struct.pack("<QQ", tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(body + bytes(-len(body) % 32) + data)
    return path


def tensor(name="t", shape=(32,), kind=0, offset=0):
    form = f"<I{len(shape)}QIQ"
    return text(name) + struct.pack(form, len(shape), *shape, kind, offset)


def test_a_complete_file_passes(tmp_path):
    check_gguf(written(tmp_path / "a.gguf"))
    check_gguf(hand_made(tmp_path / "b.gguf", tensors=[tensor()], data=bytes(128)))


def test_a_truncated_file_says_how_much_it_lacks(tmp_path):
    path = written(tmp_path / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])  # 24 bytes after the last tensor are padding
    with pytest.raises(ArtefactError, match=r"truncated: it lacks 76 bytes"):
        pliant.load(path)


def test_a_file_named_inside_a_folder_is_checked(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    ).save_pretrained(tmp_path)
    (tmp_path / "a.gguf").write_bytes(bytes(100))
    with pytest.raises(ArtefactError, match="bad magic bytes"):
        pliant.load(tmp_path, gguf_file="a.gguf")


HOSTILE = {
    "empty": (b"", "has 0 bytes"),
    "text": (b"# a model card that somebody renamed", "bad magic bytes"),
    "old": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors": (MAGIC + struct.pack("<QQ", 2**63, 0), "9223372036854775808 tensors"),
    "keys": (MAGIC + struct.pack("<QQ", 0, 2**40), "1099511627776 keys"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_start_is_refused(tmp_path, name):
    content, reason = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ArtefactError, match=reason):
        pliant.load(tmp_path / "a.gguf")


def array(of, count, content=b""):
    return text("k") + struct.pack("<IIQ", 9, of, count) + content


KEYS = {
    "long string": ([text("k") + struct.pack("<IQ", 8, 2**62)], "needs 4611686018427387904 bytes"),
    "huge array": ([array(0, 2**62)], "needs 4611686018427387904 bytes"),
    "huge strings": ([array(8, 2**60)], "declares 1152921504606846976 strings"),
    "nested": ([array(9, 1, struct.pack("<IQ", 4, 0))], "unsupported type 9"),
    "unknown type": ([text("k") + struct.pack("<IQ", 99, 0)], "unknown type 99"),
    "twice": ([ARCHITECTURE, ARCHITECTURE], "is there twice"),
    "no UTF-8": ([string_key("k", b"\xff\xfe\xff")], "not text in UTF-8"),
    "terminal": ([string_key("\x1b[2J", "a")] * 2, r"key '\\x1b\[2J' is there twice"),
    "no architecture": ([string_key("general.name", "a")], "lacks the text general.architecture"),
    "adapter": ([ARCHITECTURE, string_key("general.type", "adapter")], "holds 'adapter', not a model"),
    "part": ([ARCHITECTURE, text("split.count") + struct.pack("<IH", 2, 5)], "one of 5 parts"),
    "layers": ([ARCHITECTURE, text("llama.block_count") + struct.pack("<II", 4, 2**31)], "declares 2147483648 layers"),
    "alignment": ([ARCHITECTURE, text("general.alignment") + struct.pack("<II", 4, 48)], "power of two"),
    "no tensors": ([ARCHITECTURE], "holds no tensors"),
}


@pytest.mark.parametrize("name", KEYS)
def test_hostile_metadata_is_refused_at_once(tmp_path, name):
    keys, reason = KEYS[name]
    path = hand_made(tmp_path / "a.gguf", keys, data=bytes(64))
    start = time.perf_counter()
    with pytest.raises(ArtefactError, match=reason):
        check_gguf(path)
    assert time.perf_counter() - start < 1


def test_an_array_for_another_number_of_layers_is_refused(tmp_path):
    path = written(tmp_path / "a.gguf", lambda writer: writer.add_array("llama.attention.head_count", [1, 1, 1]))
    with pytest.raises(ArtefactError, match="has 3 entries for 2 layers"):
        check_gguf(path)


TENSORS = {
    "dimensions": ([tensor(shape=(1,) * 5)], "has 5 dimensions"),
    "overflow": ([tensor(shape=(2**63, 2))], "has shape"),
    "wraps": ([tensor(shape=(2**32, 2**32))], "truncated: it lacks"),
    "type": ([tensor(kind=999)], "unknown type 999"),
    "rows": ([tensor(shape=(33,), kind=2)], "not a multiple of 32"),
    "alignment": ([tensor(offset=4)], "multiple of 32 bytes"),
    "offset": ([tensor(offset=2**40)], "truncated: it lacks"),
    "overlap": ([tensor("a"), tensor("b", offset=64)], "'a' and 'b' share bytes"),
    "twice": ([tensor("a"), tensor("a", offset=128)], "is there twice"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors_are_refused(tmp_path, name):
    tensors, reason = TENSORS[name]
    with pytest.raises(ArtefactError, match=reason):
        check_gguf(hand_made(tmp_path / "a.gguf", tensors=tensors, data=bytes(256)))


def test_another_hidden_size_than_that_of_the_embedding_is_refused(tmp_path):
    path = written(tmp_path / "a.gguf", lambda writer: writer.add_uint32("llama.embedding_length", 2**30))
    with pytest.raises(ArtefactError, match="has 32 columns"):
        check_gguf(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_success_or_a_clear_error(tmp_path, data):
    path = tmp_path / "a.gguf"
    if not path.exists():
        written(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "b.gguf"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(ArtefactError):
        check_gguf(damaged)
