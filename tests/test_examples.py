from __future__ import annotations

import copy
import gzip
import json

import pytest
import torch

import pliant
from pliant.data.tokenize_examples import IGNORED
from pliant.errors import DataError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# the reasoning before the bar stays only in the last turn, as in templates of models that think
FORGETFUL = (
    "{% for m in messages %}<s>{{ m['role'] }}: "
    "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hm|yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "hm|no"},
]


@pytest.fixture
def chatty(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def learned(tokenizer, encoded, which=0):
    """The text of what is learned, stretch by stretch."""
    stretches, last = [], None
    for place, label in enumerate(encoded.labels[which].tolist()):
        if label != IGNORED:
            if last != place - 1:
                stretches.append([])
            stretches[-1].append(label)
            last = place
    return [tokenizer.decode(one) for one in stretches]


def test_plain_text_is_packed_into_full_windows_and_learned_whole(tokenizer):
    encoded = pliant.examples(["abcd"] * 10).encode(tokenizer, 16)
    assert [len(ids) for ids in encoded.ids] == [16] * 3  # 10 rows of 4 and 9 gaps of 2 are 58 tokens
    assert all(ids.equal(labels) for ids, labels in zip(encoded.ids, encoded.labels, strict=True))
    assert encoded.tokens == 48
    assert pliant.examples(pliant.text(["abcd"] * 10)).encode(tokenizer, 16).digest == encoded.digest


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json"])
def test_files_hold_the_same_rows_packed_or_not(tmp_path, ending):
    rows = ["one row", "another\nof two lines"]
    content = {
        ".txt": "\n\n".join(rows),
        ".jsonl": "".join(json.dumps({"text": row}) + "\n" for row in rows),
        ".json": json.dumps([{"text": row} for row in rows]),
    }[ending]
    plain, packed = tmp_path / f"some{ending}", tmp_path / f"some{ending}.gz"
    plain.write_text(content)
    packed.write_bytes(gzip.compress(content.encode()))
    assert pliant.examples(plain).rows == pliant.examples(packed).rows == pliant.examples(rows).rows
    assert len(pliant.examples(plain, limit=1).rows) == 1


def test_another_column_holds_the_text(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"body": "words"}\n')
    assert pliant.examples(tmp_path / "some.jsonl", column="body").rows[0].text == "words"
    with pytest.raises(DataError, match="row 1 has the keys body; expected are text"):
        pliant.examples(tmp_path / "some.jsonl")


def test_only_the_completion_and_where_it_ends_are_learned(tokenizer):
    encoded = pliant.examples([{"prompt": "2+2=", "completion": "4."}, {"prompt": "a", "response": "b"}]).encode(
        tokenizer, 32
    )
    assert learned(tokenizer, encoded) == ["4.</s>"]
    assert tokenizer.decode(encoded.ids[0]) == "2+2=4.</s>"
    assert learned(tokenizer, encoded, 1) == ["b</s>"]


def test_a_token_across_the_edge_is_learned(tokenizer):
    joined = copy.deepcopy(tokenizer)
    joined.add_tokens(["=4"])
    encoded = pliant.examples([{"prompt": "2+2=", "completion": "4."}]).encode(joined, 32)
    assert learned(joined, encoded) == ["=4.</s>"]


def test_instructions_go_into_the_alpaca_template(tokenizer):
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "output": "ho"},
    ]
    encoded = pliant.examples(rows).encode(tokenizer, 400)
    assert learned(tokenizer, encoded) == ["4</s>"]
    assert learned(tokenizer, encoded, 2) == ["ho</s>"]
    first, second = (tokenizer.decode(ids) for ids in encoded.ids[:2])
    assert "further context. Write a response" in first
    assert "\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n4</s>" in first
    assert second.endswith("describes a task. Write a response that appropriately completes the request.\n\n"
                           "### Instruction:\nSay hi.\n\n### Response:\nhi</s>")  # fmt: skip


def test_in_a_conversation_the_turns_of_the_assistant_are_learned(chatty):
    encoded = pliant.examples([{"messages": [*TALK, {"role": "user", "content": "unanswered"}]}]).encode(chatty, 200)
    assert learned(chatty, encoded) == ["hm|yes</s>\n", "hm|no</s>\n"]
    assert chatty.decode(encoded.ids[0]) == chatty.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_rewrites_earlier_turns_gives_each_turn_as_the_model_will_see_it(chatty):
    chatty.chat_template = FORGETFUL
    encoded = pliant.examples([{"messages": TALK}]).encode(chatty, 200)
    assert len(encoded) == 2
    assert [learned(chatty, encoded, which) for which in (0, 1)] == [["hm|yes</s>\n"], ["hm|no</s>\n"]]
    assert "assistant: yes</s>" in chatty.decode(encoded.ids[1])


def test_a_template_without_a_prompt_for_the_answer(chatty):
    chatty.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    encoded = pliant.examples([{"messages": TALK[:2]}]).encode(chatty, 200)
    assert learned(chatty, encoded) == ["[assistant] hm|yes\n"]


def test_conversations_that_cannot_be_rendered_are_refused(tokenizer, chatty):
    with pytest.raises(DataError, match=r"a list, row 1 is a conversation, and this tokenizer has no chat template"):
        pliant.examples([{"messages": TALK}]).encode(tokenizer, 64)
    with pytest.raises(DataError, match="has no turn of the assistant to train on"):
        pliant.examples([{"messages": TALK[:1]}])
    with pytest.raises(DataError, match="messages must be a list"):
        pliant.examples([{"messages": "hi"}])
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses this conversation: roles must alternate"):
        pliant.examples([{"messages": TALK}]).encode(chatty, 64)
    chatty.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match="does not put turn 2 after the turns before it"):
        pliant.examples([{"messages": TALK}]).encode(chatty, 64)


def test_long_rows_are_cut_off_and_those_that_teach_nothing_left_out(tokenizer):
    rows = [{"prompt": "x" * 20, "completion": "y"}, {"prompt": "x", "completion": "y" * 20}]
    encoded = pliant.examples(rows).encode(tokenizer, 8)
    assert (len(encoded), encoded.dropped) == (1, 1)
    assert len(encoded.ids[0]) == 8
    with pytest.raises(DataError, match="has a token to train on within its first 8 tokens; give a larger seqlen"):
        pliant.examples(rows[:1]).encode(tokenizer, 8)


def test_what_was_dropped_is_still_known_after_a_split(tokenizer):
    rows = [{"prompt": "x" * 20, "completion": "y"}, *({"prompt": "x", "completion": "y" * n} for n in range(1, 10))]
    train, held_out = pliant.examples(rows).encode(tokenizer, 8).split(2)
    assert (len(train), len(held_out), train.dropped) == (7, 2, 1)


def test_a_row_of_several_forms_teaches_its_answer_unless_a_column_is_named():
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "text": "Add. 1 1 2"}
    assert pliant.examples([row]).rows[0].completion == "2"
    assert pliant.examples([row], column="text").rows[0].text == "Add. 1 1 2"
    pair = {"prompt": "1 + 1 =", "completion": " 2", "text": "1 + 1 = 2"}
    assert pliant.examples([pair]).rows[0].completion == " 2"


@pytest.mark.parametrize("row", ["half \ud83d", {"text": "half \ud83d"}, {"prompt": "a", "completion": "\ud83d"}])
def test_half_a_character_is_refused_with_its_row(row):
    with pytest.raises(DataError, match=r"row 2: '\\ud83d' is half of a character"):
        pliant.examples(["whole \U0001f600", row])


def test_a_batch_is_filled_up_on_the_right(tokenizer):
    rows = [{"prompt": "", "completion": "yes"}, {"prompt": "ab", "completion": "yes"}]
    encoded = pliant.examples(rows).encode(tokenizer, 16)
    ids, labels, mask = encoded.batch([0, 1])
    assert ids.shape == labels.shape == mask.shape == (2, 6)
    assert mask.sum(1).tolist() == [4, 6]
    assert ids[0, :4].equal(encoded.ids[0])
    assert (labels[0, 4:] == IGNORED).all()


def test_what_is_held_out_is_spread_over_the_data(tokenizer):
    encoded = pliant.examples([{"prompt": "", "completion": "x" * n} for n in range(1, 21)]).encode(tokenizer, 64)
    rest, out = encoded.split(4)
    assert [len(ids) for ids in out.ids] == [2, 7, 12, 17]
    assert len(rest) == 16
    kept, away = pliant.examples([str(n) for n in range(20)]).split(0.25)
    assert [row.text for row in away.rows] == ["0", "4", "8", "12", "16"]
    assert len(kept.rows) == 15
    with pytest.raises(DataError, match="too few"):
        pliant.examples(["a"]).split(0.1)
    with pytest.raises(DataError, match=r"at most 0\.5"):
        kept.split(0.9)


def test_a_digest_tells_rows_and_tokens_apart(tokenizer):
    one, other = (
        pliant.examples([{"prompt": "a", "completion": "b"}]),
        pliant.examples([{"prompt": "ab", "completion": "c"}]),
    )
    assert one.digest != other.digest
    assert one.digest == pliant.examples([{"prompt": "a", "response": "b"}]).digest
    assert one.encode(tokenizer, 8).digest != other.encode(tokenizer, 8).digest


def test_a_folder_in_hub_layout_is_read_with_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "owner" / "set"
    hub.mkdir(parents=True)
    (hub / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (hub / "test.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
    assert len(pliant.examples(hub).rows) == 3
    assert pliant.examples(hub, split="test").rows[0].prompt == "c"
    assert len(pliant.examples(hub, split="train[:2]").rows) == 2
    with pytest.raises(DataError, match="split 'gone'"):
        pliant.examples(hub, split="gone")


def test_bad_sources_are_refused(tmp_path, tokenizer):
    (tmp_path / "some.csv").write_text("a,b\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for source, told in [
        (tmp_path / "gone.jsonl", "no file"),
        (tmp_path / "some.csv", "is not training data"),
        (tmp_path / "empty.jsonl", "holds no rows"),
        ([], "holds no rows"),
        (["  "], "holds no rows"),
        ([3], "row 1: a string or an object"),
        ([{"prompt": 3, "completion": "x"}], "prompt must be a string, not int"),
    ]:
        with pytest.raises(DataError, match=told):
            pliant.examples(source)
    with pytest.raises(DataError, match="the limit of rows must be at least 1; not 0"):
        pliant.examples(["a"], limit=0)
    with pytest.raises(DataError, match="must have at least 2 tokens; not"):
        pliant.examples(["a"]).encode(tokenizer, 1)


def test_without_datasets_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'pliant\[train\]'"):
        pliant.examples(tmp_path)


def test_a_mixed_file_gives_windows_and_rows(tokenizer):
    encoded = pliant.examples(["abcdefgh", {"prompt": "a", "completion": "b"}]).encode(tokenizer, 8)
    assert [len(ids) for ids in encoded.ids] == [8, 3]
    assert all(ids.dtype == torch.int64 for ids in encoded.ids)
