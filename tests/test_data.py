import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pliant
from pico import tokenizer as make_tokenizer
from pliant.errors import DataError

TOKENIZER = make_tokenizer()
ROWS = st.lists(st.text("abc é\n", min_size=1).filter(str.strip), min_size=1, max_size=30, unique_by=str.strip)


def _file(folder, name, content):
    path = folder / name
    path.write_text(content, "utf-8")
    return path


def _lines(folder, *rows, name="rows.jsonl"):
    return _file(folder, name, "\n".join(json.dumps(row) for row in rows))


# text


def test_rows_of_a_text_file_are_its_paragraphs(tmp_path):
    path = _file(tmp_path, "notes.txt", "\n\none\nstill one\n\n\ntwo  \n \t\n  three\n")
    found = pliant.text(path)
    assert found.rows == ("one\nstill one", "two", "three")
    assert found.source == "notes.txt"


def test_windows_line_ends_separate_paragraphs_too(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\nstill one\r\n\r\ntwo\r\n")
    assert pliant.text(str(path)).rows == ("one\nstill one", "two")


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    assert pliant.text(path).rows == ("one", "two")


def test_rows_of_a_jsonl_file_are_its_objects(tmp_path):
    path = _file(tmp_path, "rows.jsonl", '{"text": "one\\n\\nstill one"}\n\n{"text": " two ", "id": 7}\n{"text": ""}\n')
    assert pliant.text(path).rows == ("one\n\nstill one", "two")


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85"])
def test_a_jsonl_row_may_hold_characters_that_end_lines_elsewhere(tmp_path, odd):
    path = _file(tmp_path, "rows.jsonl", json.dumps({"text": f"one{odd}still one"}, ensure_ascii=False))
    assert pliant.text(path).rows == (f"one{odd}still one",)


def test_rows_of_a_json_file_are_its_list(tmp_path):
    path = _file(tmp_path, "rows.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    assert pliant.text(path).rows == ("one", "two")


def test_a_json_file_may_be_a_single_object(tmp_path):
    assert pliant.text(_file(tmp_path, "row.json", '{"text": "one"}')).rows == ("one",)


def test_any_iterable_of_strings_is_text():
    assert pliant.text(row for row in [" one ", "", "  ", "two"]).rows == ("one", "two")


def test_another_column_can_be_named(tmp_path):
    path = _lines(tmp_path, {"text": "no", "body": "yes"})
    assert pliant.text(path, column="body").rows == ("yes",)


def test_instruction_rows_are_joined_without_their_empty_parts(tmp_path):
    path = _lines(
        tmp_path,
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet.", "output": "Hi"},
        {"instruction": "Greet.", "input": None, "output": "Hey"},
    )
    assert pliant.text(path).rows == ("Add.\n1 and 2\n3", "Greet.\nHello", "Greet.\nHi", "Greet.\nHey")


def test_a_named_column_wins_over_instruction_keys(tmp_path):
    path = _lines(tmp_path, {"text": "whole", "instruction": "a", "output": "b"})
    assert pliant.text(path).rows == ("whole",)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"no file at '.*gone\.txt'"):
        pliant.text(tmp_path / "gone.txt")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        pliant.text(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "prose.txt/deeper.txt"])
def test_a_path_that_cannot_be_opened_is_refused(tmp_path, name):
    _file(tmp_path, "prose.txt", "one")
    with pytest.raises(DataError):
        pliant.text(f"{tmp_path}/{name}")


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt' is not UTF-8"):
        pliant.text(path)


def test_a_jsonl_line_that_is_not_json_is_refused_with_its_number(tmp_path):
    path = _file(tmp_path, "rows.jsonl", '{"text": "one"}\n\n{"text": two}\n')
    with pytest.raises(DataError, match="line 3: not JSON"):
        pliant.text(path)


def test_a_json_file_that_is_not_json_is_refused_with_the_line(tmp_path):
    path = _file(tmp_path, "rows.json", '[{"text": "one"},\n {"text": two}]')
    with pytest.raises(DataError, match=r"is not JSON: .*line 2"):
        pliant.text(path)


def test_a_row_that_is_no_object_is_refused_with_its_number(tmp_path):
    with pytest.raises(DataError, match="row 2: an object is expected, not str"):
        pliant.text(_lines(tmp_path, {"text": "one"}, "two"))


def test_a_wrong_key_is_refused_and_the_keys_are_listed(tmp_path):
    with pytest.raises(DataError, match="row 2: no key 'text'; it has body, title"):
        pliant.text(_lines(tmp_path, {"text": "one"}, {"body": "x", "title": "y"}))


@pytest.mark.parametrize("row", [{"text": 7}, {"text": None}, {"instruction": "Add.", "output": 3}])
def test_a_value_that_is_no_string_is_refused(tmp_path, row):
    with pytest.raises(DataError, match="string"):
        pliant.text(_lines(tmp_path, row))


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n \n"), ("a.jsonl", '{"text": " "}')])
def test_a_file_without_text_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match="holds no text"):
        pliant.text(_file(tmp_path, name, content))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n"), ("a.json", "[]")])
def test_a_json_file_without_rows_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match="holds no rows"):
        pliant.text(_file(tmp_path, name, content))


@pytest.mark.parametrize("rows", [[], ["", " "]])
def test_a_list_without_text_is_refused(rows):
    with pytest.raises(DataError, match="a list holds no text"):
        pliant.text(rows)


def test_a_list_of_something_else_is_refused():
    with pytest.raises(DataError, match="every row must be a string"):
        pliant.text(["one", 2])


def test_the_digest_depends_on_where_one_row_ends():
    assert pliant.text(["ab", "c"]).digest != pliant.text(["a", "bc"]).digest
    assert pliant.text(["ab", "c"]).digest == pliant.text([" ab", "c "]).digest


# sample and split


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(1, 40), st.integers(0, 2**31))
def test_a_sample_is_drawn_without_replacement(rows, count, seed):
    whole = pliant.text(rows)
    drawn = whole.sample(count, seed).rows
    assert len(drawn) == len(set(drawn)) == min(count, len(whole.rows))
    assert set(drawn) <= set(whole.rows)


def test_a_sample_depends_on_nothing_but_the_seed():
    whole = pliant.text(map(str, range(100)))
    assert whole.sample(10, 1).rows == whole.sample(10, 1).rows
    assert whole.sample(10, 1).rows != whole.sample(10, 2).rows
    assert whole.sample(10, 1).rows != whole.rows[:10]
    assert whole.sample(10, 1).source == whole.source


@settings(max_examples=50, deadline=None)
@given(ROWS, st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_a_split_is_disjoint_and_complete(rows, share):
    whole = pliant.text(rows)
    if len(whole.rows) < 1 / share:
        with pytest.raises(DataError, match=f"too few to hold {share:.0%} of them out"):
            whole.split(share)
        return
    kept, held_out = whole.split(share)
    assert sorted(kept.rows + held_out.rows) == sorted(whole.rows)
    assert kept.rows
    assert abs(len(held_out.rows) - share * len(whole.rows)) < 1


def test_a_split_takes_rows_from_all_over_and_says_so():
    kept, held_out = pliant.text(map(str, range(30))).split(0.1)
    assert held_out.rows == ("0", "10", "20")
    assert kept.source == "a list"
    assert held_out.source == "a list (held out)"


# windows


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(2, 9), st.none() | st.integers(1, 4))
def test_windows_are_the_beginning_of_the_joined_text(rows, seqlen, limit):
    whole = pliant.text(rows)
    ids = TOKENIZER("\n\n".join(whole.rows))["input_ids"]
    count = len(ids) // seqlen if limit is None else min(limit, len(ids) // seqlen)
    if count == 0:
        with pytest.raises(DataError, match=f"one window needs {seqlen}"):
            whole.windows(TOKENIZER, seqlen, limit)
        return
    found = whole.windows(TOKENIZER, seqlen, limit)
    assert found.shape == (count, seqlen)
    assert found.dtype == torch.int64
    assert found.flatten().tolist() == ids[: count * seqlen]


def test_the_text_is_tokenised_once_so_that_special_tokens_come_once():
    texts = []

    def with_start(text, **options):
        texts.append(text)
        return TOKENIZER("<s>" + text, **options)

    found = pliant.text(["one two", "three"]).windows(with_start, 4)
    assert texts == ["one two\n\nthree"]
    assert (found == TOKENIZER.bos_token_id).sum() == 1
    assert found[0, 0] == TOKENIZER.bos_token_id


def test_text_shorter_than_a_window_is_refused_with_both_lengths():
    with pytest.raises(DataError, match=r"a list: 1 row\(s\) give 5 tokens, one window needs 6"):
        pliant.text(["12345"]).windows(TOKENIZER, 6)


def test_a_window_of_one_token_is_refused():
    with pytest.raises(DataError, match="must have at least 2 tokens; not"):
        pliant.text(["12345"]).windows(TOKENIZER, 1)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_windows_is_refused_as_such(limit):
    with pytest.raises(DataError, match=rf"(?s)^(?!.*one window needs).*{limit}"):
        pliant.text(["12345"]).windows(TOKENIZER, 2, limit)


# questions

GOOD = {"context": "Sky is", "choices": ["blue", "green"], "answer": 0}


@pytest.mark.parametrize("context", ["context", "question", "query", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "label", "gold"])
def test_questions_understand_other_names_of_the_keys(tmp_path, context, answer):
    row = {context: "Sky is", "choices": ["blue", "green"], answer: 1}
    (found,) = pliant.questions(_lines(tmp_path, row))
    assert (found.context, found.choices, found.answer) == ("Sky is", (" blue", " green"), 1)


def test_questions_are_read_from_a_json_list_too(tmp_path):
    found = pliant.questions(_file(tmp_path, "q.json", json.dumps([GOOD, GOOD | {"answer": 1}])))
    assert [question.answer for question in found] == [0, 1]


@pytest.mark.parametrize(
    ("context", "choices"),
    [
        ("Sky is", (" blue", " green")),
        ("Sky is ", ("blue", "green")),
        ("Sky is\n", ("blue", "green")),
    ],
)
def test_a_space_goes_between_a_context_and_a_choice_that_have_none(tmp_path, context, choices):
    (found,) = pliant.questions(_lines(tmp_path, GOOD | {"context": context}))
    assert found.choices == choices


def test_a_choice_that_begins_with_white_space_is_left_alone(tmp_path):
    (found,) = pliant.questions(_lines(tmp_path, GOOD | {"choices": [" blue", "\ngreen"]}))
    assert found.choices == (" blue", "\ngreen")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"context": None}, "the context must be a string"),
        ({"choices": "blue"}, "the choices a list of strings"),
        ({"choices": ["blue", 7]}, "the choices a list of strings"),
        ({"choices": ["blue"]}, r"1 choice\(s\); at least 2"),
        ({"choices": ["blue", " "]}, "an empty choice"),
        ({"answer": 2}, "must be 0 to 1, .* it is 2"),
        ({"answer": -1}, "must be 0 to 1, .* it is -1"),
        ({"answer": "B"}, "must be 0 to 1, .* it is 'B'"),
        ({"answer": True}, "must be 0 to 1, .* it is True"),
    ],
)
def test_a_faulty_question_is_refused_with_its_row(tmp_path, change, told):
    with pytest.raises(DataError, match=rf"questions\.jsonl', row 2: .*{told}"):
        pliant.questions(_lines(tmp_path, GOOD, GOOD | change, name="questions.jsonl"))


@pytest.mark.parametrize(
    ("key", "told"),
    [("context", "'context' or 'question'"), ("choices", "'choices'"), ("answer", "'answer' or 'label'")],
)
def test_a_question_without_a_key_is_refused_and_its_keys_are_listed(tmp_path, key, told):
    row = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(DataError, match=f"row 1: no key {told}.*; it has {', '.join(row)}"):
        pliant.questions(_lines(tmp_path, row))


def test_missing_and_malformed_question_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file at"):
        pliant.questions(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="line 1: not JSON"):
        pliant.questions(_file(tmp_path, "q.jsonl", "Sky is blue"))


def test_no_more_questions_are_read_than_the_limit(tmp_path):
    path = _lines(tmp_path, *(GOOD | {"context": f"{i}:"} for i in range(5)))
    assert [q.context for q in pliant.questions(path, 2)] == ["0:", "1:"]
    assert len(pliant.questions(path)) == len(pliant.questions(path, 9)) == 5


def test_half_a_character_is_refused_with_its_row(tmp_path):
    path = tmp_path / "scraped.jsonl"
    path.write_text(r'{"text": "whole \ud83d\ude00"}' + "\n" + r'{"text": "half \ud83d"}', "utf-8")
    with pytest.raises(DataError, match=r"scraped.jsonl', row 2: '\\ud83d' is half of a character"):
        pliant.text(path)
    path.write_text(r'{"text": "whole \ud83d\ude00"}', "utf-8")
    assert pliant.text(path).rows == ("whole \U0001f600",)
    with pytest.raises(DataError, match="a list, row 1"):
        pliant.text(["half \ud83d"])


def test_a_tilde_in_the_path_of_data_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("One paragraph.\n\nAnother one.")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"context": "Two and two is", "continuation": " four"}))
    assert pliant.text("~/notes.txt").path == str(tmp_path / "notes.txt")
    assert len(pliant.examples("~/notes.txt").rows) == 2
    assert len(pliant.questions("~/asked.jsonl")) == 1
