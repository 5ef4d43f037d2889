"""Ollama's Modelfile says what the chat template says, or nothing."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pliant.exporters.gguf.modelfile import modelfile, turns_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}"
)
SYSTEM_IN_USER = (
    "{% set s = messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] != 'system' %}{{ '<' + m['role'] + '>' + (s if loop.index0 < 2 else '') + m['content'] }}"
    "{% endif %}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")


def tokenizer(template=None):
    words = ["<s>", "</s>", "<|im_end|>", '"quoted"', "a"]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


def test_chatml(tmp_path):
    text, notes = modelfile("m.gguf", tokenizer(CHATML_DEFAULT), [2], 32768, tmp_path, False)
    assert not notes
    assert text == (
        "FROM ./m.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """You are kind."""\n'
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 8192\n"
    )


@pytest.mark.parametrize(("adds_bos", "start"), [(True, ""), (False, "<s>")])
def test_the_first_token_is_written_once(adds_bos, start):
    turns = turns_of(tokenizer(LLAMA3), adds_bos)
    assert turns.start == start
    assert turns.default is None
    assert turns.around["system"] == ("<|start|>system<|end|>\n\n", "<|eot|>")
    assert turns.ask == "<|start|>assistant<|end|>\n\n"


def test_roles_that_begin_with_the_first_token_of_a_text():
    made = tokenizer(CHATML_DEFAULT)
    made.bos_token = "<|im_start|>"
    turns = turns_of(made, adds_bos=False)
    assert turns.start == ""
    assert turns.around["system"][0] == "<|im_start|>system\n"


def test_what_makes_the_model_answer_may_say_more_than_its_role():
    turns = turns_of(tokenizer(THINKING))
    assert turns.around["assistant"][0] == "<|im_start|>assistant\n"
    assert turns.ask == "<|im_start|>assistant\n<think>\n"


def test_a_template_without_system_messages(tmp_path):
    text, notes = modelfile("m.gguf", tokenizer(MISTRAL), [], 2048, tmp_path, True)
    assert '{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]{{ else if eq .Role "assistant" }}' in text
    assert "system" not in text
    assert notes == ["the chat template takes no system message, so that Ollama drops it"]
    assert "PARAMETER num_ctx 2048" in text


@pytest.mark.parametrize(
    "template",
    [
        SYSTEM_IN_USER,
        CHATML + "{{ strftime_now('%d %b %Y') }}",
        CHATML.replace("<|im_end|>", '"""'),
        CHATML.replace("<|im_end|>", "{{ '{{' }}"),
        "{{ raise_exception('never') }}",
        "{{ messages | length }}",
        "{{ ",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_ollama_cannot_express_is_left_out(tmp_path, template):
    text, notes = modelfile("m.gguf", tokenizer(template), [], 2048, tmp_path, False)
    assert "TEMPLATE" not in text
    assert "SYSTEM" not in text
    assert notes == ["Ollama's language cannot write this chat template, so the Modelfile has none"]


def test_models_without_a_chat_template_or_a_tokenizer(tmp_path):
    text, _ = modelfile("a b.gguf", tokenizer(), [3], 2048, tmp_path, False)
    assert text == ('FROM "./a b.gguf"\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "</s>"\nPARAMETER num_ctx 2048\n')
    assert modelfile("m.gguf", None, [], 10, tmp_path, False)[0] == "FROM ./m.gguf\nPARAMETER num_ctx 10\n"


def test_a_licence_is_copied_from_a_file_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "LICENSE" not in modelfile("m.gguf", None, [], 10, tmp_path, False)[0]
    (tmp_path / "LICENSE").write_text("Be kind.\n")
    assert "LICENSE" not in modelfile("m.gguf", None, [], 10, None, False)[0]
    assert 'LICENSE """Be kind.\n"""\n' in modelfile("m.gguf", None, [], 10, tmp_path, False)[0]
    (tmp_path / "LICENSE").write_text('"""')
    assert "LICENSE" not in modelfile("m.gguf", None, [], 10, tmp_path, False)[0]
