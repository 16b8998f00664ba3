"""Chat templates render as transformers renders them, and a template's refusal is the caller's error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ziphius.errors import CheckpointError, InvalidRequest
from ziphius.tokenizer.chat import ChatTemplate
from ziphius.tokenizer.files import TokenizerFiles
from ziphius.tokenizer.tokenizer import Tokenizer

TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK_V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_V25 = (Path(__file__).with_name("data") / "deepseek-v2.5.jinja").read_text(encoding="utf-8")
# The shape of Llama 2's and Mistral's: strict about roles, and it strips.
STRICT = (
    "{%- if messages[0].role == 'system' %}\n"
    "    {%- set system = messages[0].content | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- endif %}\n"
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}\n"
    "        {{- raise_exception('roles must alternate user/assistant') }}\n"
    "    {%- endif %}\n"
    "    {%- if message.role == 'user' %}\n"
    "        {{- '[INST] ' + ((system + '\\n') if system is defined and loop.first else '') }}\n"
    "        {{- message.content | trim }} [/INST]\n"
    "    {%- else %}\n"
    "        {%- generation %} {{ message.content | trim }}{{ eos_token }}{% endgeneration %}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
)
TOOLS = (
    "{% if tools is not none %}{% for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=2) }}\n{% endfor %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}{{ m.role }}:{{ m.content }};"
    "{% endfor %}{{ unk_token }}{% if documents is not none %}docs{% endif %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "v2": DEEPSEEK_V2, "v2.5": DEEPSEEK_V25, "strict": STRICT, "tools": TOOLS}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


CONVERSATIONS = {
    "one": [user("What is the capital of France?")],
    "system": [system("Answer in French. "), user("Hi")],
    "turns": [user("Hi"), assistant("Hello! "), user("  spaces  \n"), assistant("Yes?"), user("Bye")],
    "unicode": [user("你好 😀 <b>&amp;</b> {{ bos_token }} {% raw %}")],
    "empty": [user("")],
    "ends with assistant": [user("Write a poem."), assistant("The sea is ")],
    "extra keys": [{"role": "user", "content": "x", "name": "someone"}],
}
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"a": [1, None, True], "b": "<&>'\""}}}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_rendering_equals_transformers(template: str, conversation: str, generation_prompt: bool) -> None:
    messages = CONVERSATIONS[conversation]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=TEMPLATES[template], add_generation_prompt=generation_prompt, **TOKENS
    )
    assert ChatTemplate(TEMPLATES[template], TOKENS).render(messages, generation_prompt) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", ["ends with assistant", "turns", "one"])
def test_continuing_equals_transformers(template: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=TEMPLATES[template], continue_final_message=True, **TOKENS
    )
    assert ChatTemplate(TEMPLATES[template], TOKENS).render(messages, continue_final_message=True) == expected


def test_tools_equal_transformers() -> None:
    messages = CONVERSATIONS["one"]
    (expected,), _ = render_jinja_template([messages], tools=[TOOL], chat_template=TOOLS, **TOKENS)
    assert ChatTemplate(TOOLS, TOKENS).render(messages, False, tools=[TOOL]) == expected
    assert "größe" in expected
    assert "<&>" in expected


def test_the_real_templates(smollm2: Tokenizer, deepseek: Tokenizer) -> None:
    for tokenizer, template in ((smollm2, SMOLLM2), (deepseek, DEEPSEEK_V2)):
        assert tokenizer.chat is not None
        for messages in CONVERSATIONS.values():
            (expected,), _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=True, **TOKENS
            )
            assert tokenizer.chat.render(messages) == expected


def test_the_messages_are_left_alone() -> None:
    messages = [user("a"), assistant("b")]
    ChatTemplate(SMOLLM2, {}).render(messages, continue_final_message=True)
    assert messages == [user("a"), assistant("b")]


def test_strftime_now() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') | length }}", {}).render([user("x")]) == "4"


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (STRICT, [assistant("I start")]),  # raise_exception
        (SMOLLM2, [{"role": "user", "content": None}]),  # TypeError inside
        (SMOLLM2, [{"content": "no role"}]),  # an undefined value
        (STRICT, []),  # no first message
        ("{{ 1 / messages|length }}", []),
        ("{{ ''.__class__.__mro__ }}", [user("x")]),  # outside the sandbox
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", [user("x")]),
        ("{{ messages.append(1) }}", [user("x")]),
        ("{% for i in range(10000000) %}x{% endfor %}", [user("x")]),
    ],
)
def test_a_template_that_fails_is_an_invalid_request(source: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest, match="chat template cannot render") as caught:
        ChatTemplate(source, TOKENS).render(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}]])
def test_nothing_to_continue(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest, match="continue") as caught:
        ChatTemplate(SMOLLM2, {}).render(messages, continue_final_message=True)
    assert caught.value.param == "messages"


def test_a_template_that_drops_the_final_message() -> None:
    with pytest.raises(InvalidRequest, match="leaves out"):
        ChatTemplate("{{ messages[0].content }}", {}).render([user("a"), assistant("b")], continue_final_message=True)


def test_a_template_that_is_no_jinja() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("fine\n{% if %}", {})


def test_a_checkpoint_without_a_template() -> None:
    assert ChatTemplate.from_files(TokenizerFiles("{}", None, None, None, False, ())) is None
