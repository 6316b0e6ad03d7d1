"""Row forms against texts written out by hand, chats against what vLLM's server makes of the same request."""

import json
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fermisvd_convert.chats import RowError, _takes_parts, holds_text, render, row_text
from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.rows import TextError, rows_of

# What templates of the hub do: content added to a string, looped-over arguments, tools as JSON.
STRINGS = """
{%- if tools %}<tools>{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}
{{- '<' + m.role + '>' + m.content }}
{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }}
{%- for k, v in c.function.arguments | items %} {{ k }}={{ v | tojson }}{% endfor %}{% endfor %}
{%- if m.name is defined %}[{{ m.name }}]{% endif %}
{%- if m.tool_call_id is defined %}#{{ m.tool_call_id }}{% endif %}
{%- endfor %}"""
# Of models that see: only a list of parts is understood.
PARTS = """
{%- for m in messages %}<{{ m.role }}>
{%- if m.content is string %}string:{{ m.content }}{% else %}
{%- for part in m['content'] | list %}{{ part['text'] }}{% endfor %}{% endif %}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"""
DEVELOPERS = "{%- for m in messages %}<{{ 'dev' if m.role == 'developer' else m.role }}>{{ m.content }}{% endfor %}"
TEMPLATES = {"strings": STRINGS, "parts": PARTS, "developers": DEVELOPERS}

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def call(arguments, **more):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}} | more


def calling(*calls, **more):
    return {"role": "assistant", "tool_calls": list(calls)} | more


LOOK_UP = {"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}}
CHATS = {
    "plain": [USER, ANSWER],
    "system": [{"role": "system", "content": "be short"}, USER, ANSWER],
    "arguments as a string": [USER, calling(call('{"a": 1, "b": [null, "x"]}'), content="")],
    "arguments as an object": [USER, calling(call({"a": "é"}), content=None)],
    "no arguments": [USER, calling(call(None), call(""), content="calling")],
    "arguments that are no object": [USER, calling(call("[1]"), call("{broken"), content=None)],
    "no content": [USER, calling(call("{}"))],
    "content null": [{"role": "user", "content": None}, ANSWER],
    "no tool calls": [USER, {**ANSWER, "tool_calls": []}],
    "tool calls null": [USER, {**ANSWER, "tool_calls": None}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}, ANSWER],
    "parts of one text": [{"role": "user", "content": [{"type": "text", "text": "one"}]}],
    "no parts": [{"role": "user", "content": []}, ANSWER],
    "a text that is null": [
        {"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": "x"}]}
    ],
    "a refusal": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
    "a tool's answer": [
        USER,
        calling(call("{}")),
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {
            "role": "tool",
            "tool_call_id": "2",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
    ],
    "names": [{**USER, "name": "Ann"}, ANSWER],
    "reasoning": [USER, {**ANSWER, "reasoning": "hm"}],
    "reasoning_content": [USER, {**ANSWER, "reasoning_content": "hm"}],
    "developer": [{"role": "developer", "content": "be short"}, USER, ANSWER],
    "developer after system": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER, ANSWER],
    "developer in the middle": [USER, {"role": "developer", "content": [{"type": "text", "text": "b"}]}, ANSWER],
}


@pytest.fixture(scope="module")
def plain(demo_model):
    """Without a template."""
    return load_tokenizer(demo_model)


@pytest.fixture
def tokenizer(demo_model, request):
    made = load_tokenizer(demo_model)
    made.chat_template = STRINGS
    return made


def of_vllm(tokenizer, messages, tools=None):
    """The prompt of vLLM's OpenAI server, as text."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    from vllm.renderers import chat_utils, hf

    try:
        request = protocol.ChatCompletionRequest(messages=deepcopy(messages), tools=deepcopy(tools))
    except ValidationError:  # what its API does not take of a client, its parser takes all the same
        request = SimpleNamespace(messages=deepcopy(messages), tools=None)
    form = hf._detect_content_format(tokenizer.chat_template, default="string")
    config: Any = SimpleNamespace(  # what these functions read of a ModelConfig
        multimodal_config=None,
        enable_prompt_embeds=False,
        trust_remote_code=False,
        tokenizer_revision=None,
        code_revision=None,
        tokenizer="t",
        model="m",
    )
    conversation: Any
    conversation, _, _ = chat_utils.parse_chat_messages(request.messages, config, form)
    dumped = [tool.model_dump() for tool in request.tools] if request.tools else None
    return hf.safe_apply_chat_template(
        config, tokenizer, conversation, tools=dumped, chat_template=tokenizer.chat_template, tokenize=False
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_becomes_what_vllm_makes_of_the_request(tokenizer, chat, template):
    tokenizer.chat_template, given = TEMPLATES[template], deepcopy(CHATS[chat])
    expected = of_vllm(tokenizer, CHATS[chat])
    assert row_text(tokenizer, {"messages": given}) == expected
    assert given == CHATS[chat], "the row was changed"
    assert row_text(tokenizer, {"messages": json.dumps(given)}) == expected
    assert row_text(tokenizer, {"conversations": given}) == expected
    assert row_text(tokenizer, {"prompt": given[:1], "completion": given[1:]}) == expected


LOOPS = {
    "{% for m in messages %}{{ m.content }}{% endfor %}": False,
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c.content }}{% endfor %}{% endfor %}": False,
    "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}": True,
    "{% for m in messages %}{% for c in m['content'] | list %}{{ c.text }}{% endfor %}{% endfor %}": True,
    "{% for m in messages %}{% set content = m.content %}{% for c in content %}{{ c }}{% endfor %}{% endfor %}": True,
    "{% macro show(content) %}{% for c in content %}{{ c.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}": True,
    "{% for m in messages[1:] %}{% for c in m['content'] %}{% generation %}{{ c }}{% endgeneration %}"
    "{% endfor %}{% endfor %}": True,
}


@pytest.mark.parametrize("template", LOOPS)
def test_templates_that_loop_over_parts_are_told_as_vllm_tells_them(template):
    hf = pytest.importorskip("vllm.renderers.hf")
    assert _takes_parts(template) is LOOPS[template]
    assert hf._detect_content_format(template, default="string") == ("openai" if LOOPS[template] else "string")


@pytest.mark.parametrize("tools", [None, [], [LOOK_UP], [LOOK_UP, {"name": "g"}], [{**LOOK_UP, "strict": True}]])
def test_tools_reach_the_template_as_in_vllm(tokenizer, tools):
    wrapped = tools and [{"type": "function", "function": tool} for tool in tools]
    expected = of_vllm(tokenizer, CHATS["plain"], wrapped or None)
    assert ("look_up" in expected) == bool(tools)
    for form in (tools, wrapped, json.dumps(tools), json.dumps(wrapped)):
        assert row_text(tokenizer, {"messages": CHATS["plain"], "tools": form}) == expected


WITH_TEMPLATE = [
    ({"text": "as it is <b>"}, "as it is <b>"),
    ({"text": "a", "id": "row-1", "url": "https://example.org"}, "a"),
    ({"text": "a", "messages": None}, "a"),
    ({"messages": CHATS["plain"], "text": "<already rendered>"}, "<user>hi<assistant>ho"),
    (
        {"id": "7", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        "<user>hi<assistant>ho",
    ),
    (
        {
            "system": "be short",
            "conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}],
        },
        "<system>be short<user>hi<assistant>ho",
    ),
    (
        {"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}], "system": "not twice"},
        "<system>a<user>b",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "5?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"n": 5}}'},
                {"from": "observation", "value": "ok"},
                {"from": "gpt", "value": "done"},
            ],
            "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
        },
        '<tools>[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]'
        "<user>5?<assistant><call>f n=5<tool>ok<assistant>done",
    ),
    (
        {"conversations": [{"from": "tool", "value": "x"}, {"from": "function_response", "value": "y"}]},
        "<tool>x<tool>y",
    ),
    ({"conversations": '[{"from": "chatgpt", "value": "ho"}]'}, "<assistant>ho"),
    ({"instruction": "add", "input": "1 2", "output": "3"}, "<user>add\n1 2<assistant>3"),
    ({"instruction": "add", "input": "", "response": "3"}, "<user>add<assistant>3"),
    ({"instruction": "add", "output": "3", "input": None, "response": None}, "<user>add<assistant>3"),
    ({"instruction": "add", "output": "3", "system": "s"}, "<system>s<user>add<assistant>3"),
    ({"prompt": "hi", "completion": "ho"}, "<user>hi<assistant>ho"),
    ({"prompt": "hi", "response": "ho", "prompt_id": "x"}, "<user>hi<assistant>ho"),
    ({"prompt": [USER], "completion": [ANSWER], "id": "1"}, "<user>hi<assistant>ho"),
    ({"prompt": json.loads("[" + json.dumps(USER) + "]"), "completion": "ho"}, "<user>hi<assistant>ho"),
    # empty rows
    ({"text": ""}, ""),
    ({"text": " \n"}, ""),
    ({"messages": []}, ""),
    ({"messages": "[]"}, ""),
    ({"messages": ""}, ""),
    ({"conversations": []}, ""),
    ({"conversations": [], "system": "s"}, ""),
    ({"instruction": "", "input": " ", "output": ""}, ""),
    ({"prompt": "", "completion": ""}, ""),
    ({"prompt": [], "completion": []}, ""),
]
WITHOUT_TEMPLATE = [
    ({"text": "as it is"}, "as it is"),
    ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n1 2\n3"),
    ({"instruction": "add", "input": "", "output": "3", "system": "s"}, "s\nadd\n3"),
    ({"prompt": "hi", "completion": "ho"}, "hi\nho"),
    ({"prompt": "", "response": "ho"}, "ho"),
    ({"messages": []}, ""),
]


@pytest.mark.parametrize(("row", "text"), WITH_TEMPLATE)
def test_every_form_with_a_template(tokenizer, row, text):
    assert row_text(tokenizer, row) == text


@pytest.mark.parametrize(("row", "text"), WITHOUT_TEMPLATE)
def test_every_form_without_a_template(plain, row, text):
    assert row_text(plain, row) == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "row-1", "url": "x", "text": None},
            r"no text in its fields \(id, url, text \(null\)\); known are text;",
        ),
        ({"id": "row-1", "messages": None}, r"no text in its fields \(id, messages \(null\)\)"),
        ({"question": "1+1?", "answer": "two"}, r"no text in its fields \(question, answer\)"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "no text in its fields .prompt, chosen, rejected"),
        ({"instruction": "add", "output": None}, "no text in its fields .instruction, output .null"),
        ({}, r"no text in its fields \(none\)"),
        ("a", "a string, not a row of named fields"),
        ([1], "a list, not a row of named fields"),
        (None, "null, not a row"),
        ({"text": 3}, "text: a number, not a string"),
        ({"text": ["a"]}, "text: a list, not a string"),
        ({"text": "half \ud83d"}, r"not Unicode text \(surrogates not allowed: '\\ud83d'\)"),
        ({"instruction": "a", "output": ["b"]}, "output: a list, not a string"),
        ({"instruction": "a", "input": {}, "output": "b"}, "input: an object, not a string"),
        ({"prompt": 1, "completion": "a"}, "prompt: a number, not a list"),
        ({"prompt": [1], "completion": "a"}, "message 1 is a number, not one with role and content"),
        ({"messages": 7}, "messages: a number, not a list"),
        ({"messages": {"role": "user"}}, "messages: an object, not a list"),
        ({"messages": "hello"}, "messages: a string that is no JSON"),
        ({"messages": ["hello"]}, "message 1 is a string, not one with role and content"),
        ({"messages": [USER, {}]}, "message 2 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: its content is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1: a part of type image_url"),
        ({"messages": [{"role": "user", "content": [None]}]}, "message 1: a part of type None"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "message 1: a part of type None"),
        ({"messages": [calling(call({}, type="custom"))]}, "message 1: a tool call that is none of a function"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "message 1: its tool_calls are a number"),
        ({"messages": [{**ANSWER, "reasoning": 3}]}, "message 1: its reasoning is a number"),
        ({"messages": [USER], "tools": [3]}, "tools: number 1 is no function with a name"),
        ({"messages": [USER], "tools": "x"}, "tools: a string that is no JSON"),
        (
            {"messages": [USER, {"role": "system", "content": "late"}]},
            "chat template does not take its messages .system",
        ),
        ({"conversations": ["hello"]}, "message 1 is a string, not one with from and value"),
        ({"conversations": [{"from": 3, "value": "a"}]}, "message 1: from is a number"),
        ({"conversations": [{"from": "human", "value": {}}]}, "message 1: its content is an object"),
        (
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "message 1, a function_call,: a string that is",
        ),
        ({"conversations": [{"value": "a"}]}, "message 1 has no role"),
        ({"conversations": [USER], "system": 3}, "system: a number, not a string"),
    ],
)
def test_what_is_refused_says_why(tokenizer, row, message):
    with pytest.raises(RowError, match=message):
        row_text(tokenizer, row)


@pytest.mark.parametrize("row", [{"messages": [USER]}, {"conversations": [{"from": "human", "value": "a"}]}])
def test_chats_need_a_template(plain, row):
    with pytest.raises(RowError, match="no chat template"):
        row_text(plain, row)


@pytest.mark.parametrize(
    "template", ["{% for", "{{ 1 / 0 }}", "{{ messages[9].content.x }}", "{{ raise_exception('no') }}"]
)
def test_whatever_a_template_raises_is_one_error(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(RowError, match="chat template does not take its messages"):
        render(tokenizer, [USER])


def test_templates_of_a_tokenizer_that_has_several(tokenizer):
    """As transformers and vLLM: `tool_use` where there are tools."""
    tokenizer.chat_template = {"default": "default {{ messages[0].content }}", "tool_use": "tools {{ tools | length }}"}
    assert row_text(tokenizer, {"messages": [USER]}) == "default hi"
    assert row_text(tokenizer, {"messages": [USER], "tools": [LOOK_UP]}) == "tools 1"


KNOWN = (
    *("text", "messages", "conversations", "instruction", "input", "output", "response", "prompt", "completion"),
    *("system", "tools"),
)
NAMES = st.sampled_from([*KNOWN, "id", "role", "content", "from", "value", "type", "tool_calls", "function", "name"])
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "developer"]), "from": st.sampled_from([None, "gpt", "x"])},
    optional={
        name: st.one_of(
            st.none(),
            st.text(max_size=5),
            st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}), max_size=2),
        )
        for name in ("content", "value", "reasoning", "tool_calls")
    },
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), TURN),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(NAMES | st.text(), inner, max_size=4), inner.map(json.dumps)
    ),
    max_leaves=12,
)


def strings(value):
    """All strings in it, JSON inside of strings too."""
    if isinstance(value, str):
        yield value
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
        if isinstance(value, str):
            return
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}\n{% endfor %}"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=JSON | st.dictionaries(NAMES, JSON, max_size=4))
def test_any_json_gives_text_of_known_fields_or_is_refused(tokenizer, template, row):
    tokenizer.chat_template = template
    try:
        text = row_text(tokenizer, row)
    except RowError:
        return
    assert holds_text(row)
    there = [string for name in KNOWN for string in strings(row.get(name))]
    for line in text.split("\n"):
        assert any(line in string for string in there) or not line


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz", "a.jsonl.zst", "a.parquet.gz"]),
    data=st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.text(alphabet='[]{},":\n1a').map(str.encode),
)
def test_any_bytes_give_rows_or_a_refusal(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    try:
        rows = list(rows_of(str(path)))
    except TextError as error:
        assert str(error).startswith(f"{path}: ")
        return
    assert all(where.startswith(str(path)) for where, _ in rows)
