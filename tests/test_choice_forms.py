import gzip
import json

import pytest

import pliant
from pliant.data import OpenQuestion, Question
from pliant.errors import DataError


def _read(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return pliant.questions(path)


def _instruction(what, choices, answer, word="Answer"):
    listed = " ".join(f"{word}{number}: {choice}" for number, choice in enumerate(choices, 1))
    formats = "/".join(f"{word.lower()}{number}" for number in range(1, len(choices) + 1))
    return {
        "instruction": f"{what}\n\n{listed}\n\nAnswer format: {formats}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


CHOOSE = "Please choose the correct answer to the question: "
ARC = {
    "id": "Mercury_1",
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
OPENBOOKQA = {
    "id": "7-980",
    "question_stem": "The sun is responsible for",
    "choices": {"text": ["puppies", "plants sprouting"], "label": ["A", "B"]},
    "answerKey": "B",
}
PIQA = {"goal": "How do I dry a cat?", "sol1": "Use a towel.", "sol2": "Use an oven.", "label": 0}
HELLASWAG = {
    "activity_label": "Removing ice from car",
    "ctx_a": "A woman smiles.",
    "ctx_b": "then",
    "ctx": "A woman smiles. then",
    "endings": [", the man adds wax.", "[substeps] He  sings. [title] Go on.", "he sleeps.", "he eats."],
    "label": "1",
}
WINOGRANDE = {
    "sentence": "The wine ruins the bed, but the _ was fine.",
    "option1": "blanket",
    "option2": "bed",
    "answer": "2",
}
BOOLQ = {"passage": "Tax is due.", "question": "is tax due", "idx": 0, "label": 1}
SIQA = {
    "context": "Tracy went home.",
    "question": "Where is Tracy?",
    "answerA": "at home",
    "answerB": "away",
    "answerC": "on the moon",
    "label": "3",
}
MMLU = {
    "question": " What is force? ",
    "subject": "high_school_physics",
    "choices": ["mass", "mass times acceleration", "time", "energy"],
    "answer": 1,
}
MMLU_CONTEXT = (
    "The following are multiple choice questions (with answers) about high school physics.\n\nWhat is force?\nA. mass\n"
    "B. mass times acceleration\nC. time\nD. energy\nAnswer:"
)
ASKED = "Question: Which is hot?\nAnswer:"
SENTENCE = "The wine ruins the bed, but the "
SENTENCES = (f"{SENTENCE}blanket", f"{SENTENCE}bed")

POSED = {
    "ARC": (ARC, Question(ASKED, (" ice", " fire", " snow"), 1)),
    "ARC with numbers": (
        ARC | {"choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        Question(ASKED, (" ice", " fire"), 1),
    ),
    "OpenBookQA": (OPENBOOKQA, Question("The sun is responsible for", (" puppies", " plants sprouting"), 1)),
    "PIQA": (PIQA, Question("Question: How do I dry a cat?\nAnswer:", (" Use a towel.", " Use an oven."), 0)),
    "HellaSwag": (
        HELLASWAG,
        Question(
            "Removing ice from car: A woman smiles. Then",
            (" , the man adds wax.", "  He sings.. Go on.", " he sleeps.", " he eats."),
            1,
        ),
    ),
    "HellaSwag in one piece": (
        {"activity_label": "Rowing", "ctx": "A boat", "endings": ["sinks.", "swims."], "label": 0},
        Question("Rowing: A boat", (" sinks.", " swims."), 0),
    ),
    "WinoGrande": (WINOGRANDE, Question(SENTENCES, (" was fine.", " was fine."), 1)),
    "BoolQ": (BOOLQ, Question("Tax is due.\nQuestion: is tax due?\nAnswer:", (" no", " yes"), 1)),
    "BoolQ with a truth value": (
        {"passage": "Tax is due.", "question": "is tax due?", "answer": False},
        Question("Tax is due.\nQuestion: is tax due?\nAnswer:", (" no", " yes"), 0),
    ),
    "SIQA": (
        SIQA,
        Question("Q: Tracy went home. Where is Tracy?\nA:", (" at home", " away", " on the moon"), 2),
    ),
    "MMLU": (MMLU, Question(MMLU_CONTEXT, (" A", " B", " C", " D"), 1)),
    "GSM8K": (
        {"question": "How many apples?", "answer": "3 and 4 make <<3+4=7>>7.\n#### 1,007"},
        OpenQuestion("Question: How many apples?\nAnswer:", "1,007"),
    ),
    "MAWPS": (
        {"id": 3, "original_text": "How many apples are 3 and 4 ? ", "equation": "X=3+4", "ans": "7"},
        OpenQuestion("Question: How many apples are 3 and 4 ?\nAnswer:", "7.0"),
    ),
    "question and answer": (
        {"question": "Capital of France?", "answer": " Paris "},
        OpenQuestion("Question: Capital of France?\nAnswer:", "Paris"),
    ),
    "llm-adapters, answers": (
        _instruction(CHOOSE + "Which is hot?", ["ice", "fire", "snow"], "answer2"),
        Question(ASKED, (" ice", " fire", " snow"), 1),
    ),
    "llm-adapters, solutions": (
        _instruction(
            "Please choose the correct solution to the question: How do I dry a cat: fast?",
            ["Use a towel. ", "Use an oven.\n"],
            "solution1",
            "Solution",
        ),
        Question("Question: How do I dry a cat: fast?\nAnswer:", (" Use a towel.", " Use an oven."), 0),
    ),
    "llm-adapters, options": (
        _instruction(
            f"Please choose the correct answer to fill in the blank to complete the given sentence: {SENTENCE}_ was "
            "fine.",
            ["blanket", "bed"],
            "option2",
            "Option",
        ),
        Question(SENTENCES, (" was fine.", " was fine."), 1),
    ),
    "llm-adapters, endings": (
        _instruction(
            "Please choose the correct ending to complete the given sentence: Rowing: A boat",
            ["sinks.", "swims."],
            "ending1",
            "Ending",
        ),
        Question("Rowing: A boat", (" sinks.", " swims."), 0),
    ),
    "llm-adapters, true or false": (
        {
            "instruction": "Please answer the following question with true or false, question: is tax due?\n\n"
            "Answer format: true/false",
            "answer": "true",
        },
        Question("Question: is tax due?\nAnswer:", (" no", " yes"), 1),
    ),
    "llm-adapters, maths": (
        {"instruction": " How many apples? ", "input": "", "output": "The answer is 7.", "answer": "7.0"},
        OpenQuestion("Question: How many apples?\nAnswer:", "7.0"),
    ),
    "llm-adapters, letters": (
        {"instruction": "How many? Answer Choices: (A) 1 (B) 2", "input": "Count.", "answer": "B"},
        OpenQuestion("Question: How many? Answer Choices: (A) 1 (B) 2\nCount.\nAnswer:", "B"),
    ),
}


@pytest.mark.parametrize(("row", "posed"), POSED.values(), ids=POSED)
def test_a_row_is_recognised_and_posed_as_lm_eval_poses_it(tmp_path, row, posed):
    assert _read(tmp_path, row) == [posed]


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("openbookqa-test.jsonl", "Which is hot?"),
        ("openbookqa/test.jsonl", "Which is hot?"),
        ("social_i_qa-test.jsonl", "Q: Which is hot?\nA:"),
        ("ARC-Easy-test.jsonl", ASKED),
    ],
)
def test_a_file_name_tells_data_sets_apart_whose_rows_look_the_same(tmp_path, name, context):
    (found,) = _read(tmp_path, _instruction(CHOOSE + "Which is hot?", ["ice", "fire"], "answer1"), name=name)
    assert found == Question(context, (" ice", " fire"), 0)


@pytest.mark.parametrize(
    ("good", "change", "told"),
    [
        (ARC, {"answerKey": "D"}, "'answerKey' must be A, B or C; it is 'D'"),
        (ARC, {"choices": ["ice", "fire"]}, 'the choices must be {"text"'),
        (ARC, {"choices": {"text": ["ice", "fire"], "label": ["A"]}}, "2 choices have 1 labels"),
        (ARC, {"choices": {"text": ["ice"], "label": ["A"]}}, r"1 choice\(s\)"),
        (ARC, {"question": None}, "'question' must be a string; it is None"),
        (OPENBOOKQA, {"choices": {"text": ["a", 7], "label": ["A", "B"]}}, "'text' must be a list of strings"),
        (PIQA, {"label": -1}, "'label' must be 0 or 1; it is -1.*without public answers"),
        (PIQA, {"sol2": " "}, "an empty choice"),
        (HELLASWAG, {"label": ""}, "'label' must be 0, 1, 2 or 3; it is ''"),
        (HELLASWAG, {"endings": ["one"]}, r"1 choice\(s\)"),
        (WINOGRANDE, {"answer": ""}, "'answer' must be 1 or 2"),
        (WINOGRANDE, {"sentence": "No gap."}, "must have a _ to fill"),
        (WINOGRANDE, {"sentence": "The end is _"}, "must have a _ to fill"),
        (BOOLQ, {"label": "maybe"}, "'label' must be 0 or 1"),
        (SIQA, {"label": "4"}, "'label' must be 1, 2 or 3"),
        (MMLU, {"answer": 4}, "'answer' must be 0, 1, 2 or 3"),
        (MMLU, {"choices": "ABCD"}, "'choices' must be a list of strings"),
        (POSED["GSM8K"][0], {"answer": "7 ####"}, "the answer is empty"),
        (POSED["GSM8K"][0], {"answer": 7}, "'answer' must be a string"),
        (POSED["GSM8K"][0], {"choices": ["7", "8"]}, "the answer must be 0 to 1"),
        (POSED["MAWPS"][0], {"ans": "seven"}, "'ans' must be a number; it is 'seven'"),
        (POSED["llm-adapters, answers"][0], {"answer": "answer4"}, r"lists 3 choice\(s\)"),
        (POSED["llm-adapters, answers"][0], {"instruction": "Which?"}, r"lists 0 choice\(s\)"),
        (POSED["llm-adapters, maths"][0], {"answer": " "}, "the answer is empty"),
        (POSED["llm-adapters, maths"][0], {"instruction": ["How", "many"]}, "'instruction' must be a string"),
    ],
)
def test_a_faulty_row_is_refused_with_its_number(tmp_path, good, change, told):
    with pytest.raises(DataError, match=rf"rows\.jsonl', row 2: .*{told}"):
        _read(tmp_path, good, good | change)


def test_a_row_of_no_known_form_is_refused_and_the_forms_are_listed(tmp_path):
    with pytest.raises(DataError, match=r"row 1: no key 'context'.*; it has body, title\. .*ARC, OpenBookQA, PIQA"):
        _read(tmp_path, {"body": "x", "title": "y"})


def test_questions_with_choices_and_open_ones_do_not_mix_in_a_file(tmp_path):
    with pytest.raises(DataError, match=r"row 2: .*put them into separate files"):
        _read(tmp_path, ARC, POSED["GSM8K"][0])


@pytest.mark.parametrize("name", ["q.jsonl.gz", "q.json.gz", "q.JSON.GZ"])
def test_a_gzipped_file_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps([ARC] if "json." in name.lower() else ARC).encode()))
    assert pliant.questions(path) == [POSED["ARC"][1]]


def test_gzipped_text_is_read_too(tmp_path):
    path = tmp_path / "prose.txt.gz"
    path.write_bytes(gzip.compress(b"one\r\n\r\ntwo"))
    assert pliant.text(path).rows == ("one", "two")
    path = tmp_path / "prose.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}'))
    assert pliant.text(path).rows == ("one",)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"x" * 99)[:-9], gzip.compress(b"x" * 99)[:12] + b"zz" * 20],
    ids=["something else", "cut off", "overwritten"],  # a compressed file names the time
)
def test_a_damaged_gzip_file_is_refused(tmp_path, content):
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"q\.jsonl\.gz' is not a complete gzip file"):
        pliant.questions(path)


# what counts as the answer


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("7", "The answer is 7."),
        ("7.0", "3 and 4 make 7"),
        ("1,007", "#### 1007"),
        ("1007", "It costs $1,007.00!"),
        ("7", "10-3 = 10-3=7"),
        ("-7", "so it is -7."),
        ("0.5", "half of it, .5"),
        ("1.8333333333333335", "1.833"),
        ("B", "The answer is (B)."),
        ("B", " B"),
        ("B", "Neither A nor C, hence B: 4"),
        ("B", "The answer is B. I think so."),
        ("B", "B. A train goes"),
        ("B", "(B) A train goes"),
        ("B", "Answer: B\nC would be too long"),
        ("B", "A train that goes so far needs B"),
        ("Paris", " paris.\nQuestion"),
        ("the old mill", "\n The old mill "),
    ],
)
def test_an_answer_is_found_in_what_is_written(answer, written):
    assert OpenQuestion("", answer).matches(written)


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("7", "7 of 9"),
        ("7", "-7"),
        ("3", "7-4"),
        ("7", ""),
        ("7", "seven"),
        ("B", "Because"),
        ("B", "B or C"),
        ("A", "A train that goes so far needs B"),
        ("A", "The answer is B, A is wrong"),
        ("A", "the answer is a matter of taste"),
        ("B", ""),
        ("Paris", "It is Paris"),
        ("Paris", ""),
    ],
)
def test_another_answer_is_not(answer, written):
    assert not OpenQuestion("", answer).matches(written)


def test_the_folder_tells_the_form_from_inside_it_too(tmp_path, monkeypatch):
    told = {"instruction": "Please choose: The sky is\n\nAnswer1: blue Answer2: red\n\nAnswer format: answer1/answer2"}
    folder = tmp_path / "openbookqa"
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps([{**told, "answer": "answer1"}]))
    outside = pliant.questions(folder / "test.json")
    monkeypatch.chdir(folder)
    assert pliant.questions("test.json") == outside
    (tmp_path / "test.json").write_text(json.dumps([{**told, "answer": "answer1"}]))
    assert pliant.questions(tmp_path / "test.json") != outside
