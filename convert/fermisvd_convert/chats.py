"""A row's text: its form is told by its fields, and chats go through the model's template as vLLM sends them there."""

import json
from collections.abc import Callable
from functools import lru_cache

from jinja2 import nodes

SHARE_GPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}  # type of a part -> its field


KNOWN = "text; messages; conversations; instruction, input, output or response; prompt, completion or response"


class RowError(Exception):
    """A row that cannot be used; `--skip-bad-rows` goes on without it."""


def row_text(tokenizer, row: object) -> str:
    """The text of a row, "" for an empty one. Raises RowError for a row of no known form, or of one in disorder.

    A field that is null is not there. Of several forms the first of FORMS is taken.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"{_kind(row)}, not a row of named fields")
    form = _form(row)
    if form is None:
        null = {name for name, value in row.items() if value is None}
        names = ", ".join(f"{name} (null)" if name in null else str(name) for name in row)
        raise RowError(f"no text in its fields ({names or 'none'}); known are {KNOWN}")
    text = form(tokenizer, row)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair, which is no character
        raise RowError(f"not Unicode text ({error.reason}: {text[error.start]!a})") from None
    return text if text.strip() else ""


def holds_text(row: dict) -> bool:
    """Whether the row is of a known form, by its fields."""
    return _form(row) is not None


def _form(row: dict) -> Callable | None:
    there = {name for name, value in row.items() if value is not None}
    return next((form for form, fields in FORMS if all(there.intersection(options) for options in fields)), None)


def _messages(tokenizer, row: dict) -> str:
    return render(tokenizer, _list(row["messages"], "messages"), _tools(row))


def _share_gpt(tokenizer, row: dict) -> str:
    turns = _list(row["conversations"], "conversations")
    messages = [_share_gpt_message(turn, number) for number, turn in enumerate(turns, 1)]
    return render(tokenizer, [*_system(row, messages), *messages] if messages else [], _tools(row))


def _text(tokenizer, row: dict) -> str:
    return _string(row, "text")


def _alpaca(tokenizer, row: dict) -> str:
    asked = [_string(row, name) for name in ("instruction", "input", "context") if row.get(name) is not None]
    return _exchange(tokenizer, row, "\n".join(filter(None, asked)), _string(row, _first(row, "output", "response")))


def _prompt(tokenizer, row: dict) -> str:
    second = _first(row, "completion", "response")
    if isinstance(row["prompt"], str) and isinstance(row[second], str):
        return _exchange(tokenizer, row, row["prompt"], row[second])
    messages = []
    for name, role in (("prompt", "user"), (second, "assistant")):
        if isinstance(row[name], str):
            messages.append({"role": role, "content": row[name]})
        else:
            messages += _list(row[name], name)
    return render(tokenizer, [*_system(row, messages), *messages], _tools(row))


# One of each of the fields must be there.
FORMS: tuple[tuple[Callable[..., str], tuple[tuple[str, ...], ...]], ...] = (
    (_messages, (("messages",),)),
    (_share_gpt, (("conversations",),)),
    (_text, (("text",),)),
    (_alpaca, (("instruction",), ("output", "response"))),
    (_prompt, (("prompt",), ("completion", "response"))),
)


def _exchange(tokenizer, row: dict, asked: str, answered: str) -> str:
    """A question and its answer: a chat where the tokenizer has a template, else one below the other."""
    if not (asked + answered).strip():
        return ""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages = [*_system(row, messages), *messages]
    if not tokenizer.chat_template:
        return "\n".join(filter(None, (message["content"] for message in messages)))
    return render(tokenizer, messages, _tools(row))


def render(tokenizer, messages: list, tools: list | None = None) -> str:
    """Messages through the chat template; "" for none. Raises RowError for what vLLM or the template would refuse."""
    if not messages:
        return ""
    if not tokenizer.chat_template:
        raise RowError("messages, but the model's tokenizer has no chat template")
    try:
        template = tokenizer.get_chat_template(tools=tools)
        chat = [_as_vllm(message, number, _takes_parts(template)) for number, message in enumerate(messages, 1)]
        if not ('"developer"' in template or "'developer'" in template):
            chat = _developers_as_system(chat)
        return tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
    except RowError:
        raise
    except Exception as error:  # a template is a program of others, and raises what it likes
        raise RowError(f"the model's chat template does not take its messages ({error})") from None


def _as_vllm(message: object, number: int, parts: bool) -> dict:
    """A message as vLLM hands it to the template (vllm.renderers.chat_utils); parts: content as a list of parts."""
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {_kind(message)}, not one with role and content")
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(f"message {number} has no role")
    texts = _content(message.get("content"), number)
    as_parts = parts and role != "tool"
    chat: dict = {
        "role": role,
        "content": [{"type": "text", "text": t} for t in texts] if as_parts else "\n".join(texts),
    }
    if role == "assistant":
        if calls := message.get("tool_calls"):
            chat["tool_calls"] = _calls(calls, number)
        reasoning = next((r for r in map(message.get, ("reasoning", "reasoning_content")) if r is not None), None)
        if reasoning is not None:
            if not isinstance(reasoning, str):
                raise RowError(f"message {number}: its reasoning is {_kind(reasoning)}, not a text")
            chat["reasoning"] = chat["reasoning_content"] = reasoning
    if role == "tool" and message.get("tool_call_id") is not None:
        chat["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        chat["name"] = message["name"]
    if role == "developer":
        chat["tools"] = message.get("tools")
    return chat


def _content(content: object, number: int) -> list[str]:
    """The texts of a message's content: of none, of one, or of a list of parts."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise RowError(f"message {number}: its content is {_kind(content)}, not a text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        holder = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        text = part if holder is None else part.get(holder)
        if holder is not None and text is None:  # Parquet has a null for each field of other parts
            continue
        if not isinstance(text, str):
            raise RowError(f"message {number}: a part of type {kind}, only texts are read")
        texts.append(text)
    return texts


def _calls(calls: object, number: int) -> list[dict]:
    """Tool calls with their arguments parsed, {} for arguments that are no JSON object."""
    if not isinstance(calls, list):
        raise RowError(f"message {number}: its tool_calls are {_kind(calls)}, not a list")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise RowError(f"message {number}: a tool call that is none of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        parsed.append({**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}})
    return parsed


def _developers_as_system(chat: list[dict]) -> list[dict]:
    """For a template that knows no developers; of several system messages then one is made, at the beginning."""
    told = [message for message in chat if message["role"] in ("system", "developer")]
    if all(message["role"] == "system" for message in told):
        return chat
    others = [message for message in chat if message not in told]
    content = "\n\n".join(filter(None, ("\n".join(_content(message["content"], 0)) for message in told)))
    if told == chat[:1]:
        content = told[0]["content"]
    return [{"role": "system", "content": content}, *others]


@lru_cache(maxsize=32)
def _takes_parts(template: str) -> bool:
    """Whether the template loops over a message's content, and so is given a list of parts."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for loop in _compile_jinja_template(template).environment.parse(template).find_all(nodes.For):
        over = loop.iter
        while isinstance(over, nodes.Filter | nodes.Test) and over.node is not None:
            over = over.node
        if isinstance(over, nodes.Getitem) and isinstance(over.arg, nodes.Const) and over.arg.value == "content":
            return True
        if (isinstance(over, nodes.Getattr) and over.attr == "content") or (
            isinstance(over, nodes.Name) and over.name == "content"
        ):
            return True
    return False


def _share_gpt_message(turn: object, number: int) -> dict:
    """A turn of from and value, or of role and content, as a message."""
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is {_kind(turn)}, not one with from and value")
    if turn.get("from") is None:
        return turn
    role, value = turn["from"], turn.get("value")
    if not isinstance(role, str):
        raise RowError(f"message {number}: from is {_kind(role)}")
    if role != "function_call":
        return {"role": SHARE_GPT_ROLES.get(role, role), "content": value}
    calls = _list(value, f"message {number}, a function_call,", alone=True)
    if not all(isinstance(call, dict) for call in calls):
        raise RowError(f"message {number}: a function_call without name and arguments")
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [call if "function" in call else {"type": "function", "function": call} for call in calls],
    }


def _system(row: dict, messages: list) -> list[dict]:
    """The row's own `system` field, as a message before others."""
    first = messages[0] if messages else None
    there = isinstance(first, dict) and first.get("role") == "system"
    return [{"role": "system", "content": _string(row, "system")}] if row.get("system") and not there else []


def _tools(row: dict) -> list | None:
    """The row's `tools`, a list of functions or the JSON of one, as vLLM's server hands them to the template."""
    if not row.get("tools"):
        return None
    tools = []
    for number, tool in enumerate(_list(row["tools"], "tools"), 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools: number {number} is no function with a name")
        kept = {name: function.get(name) for name in ("name", "description", "parameters")}
        strict = {} if function.get("strict") is None else {"strict": function["strict"]}
        tools.append({"type": "function", "function": kept | strict})
    return tools or None


def _list(value: object, name: str, alone: bool = False) -> list:
    """A list, or the JSON of one; alone: of a single object too."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
            value = [] if value is None else value
        except (ValueError, RecursionError) as error:
            raise RowError(f"{name}: a string that is no JSON ({error})") from None
    if alone and isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise RowError(f"{name}: {_kind(value)}, not a list")
    return value


def _first(row: dict, *names: str) -> str:
    return next(name for name in names if row.get(name) is not None)


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise RowError(f"{name}: {_kind(row[name])}, not a string")
    return row[name]


def _kind(value: object) -> str:
    """What JSON calls it."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
