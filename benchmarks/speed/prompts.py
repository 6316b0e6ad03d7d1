"""Prompts that people give: maths problems and role play, from the shared data, through a model's chat template."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from tests.support import SHARED

LONGEST = 160  # tokens of a prompt


def gsm8k() -> Iterator[str]:
    for line in (SHARED / "tasks" / "gsm8k.test.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["question"]


def role_play() -> Iterator[str]:
    for row in json.loads((SHARED / "chat" / "gpteacher.roleplay-instruct.json").read_text(encoding="utf-8")):
        yield "\n".join(part for part in (row["instruction"], row["input"]) if part)


KINDS: dict[str, Callable[[], Iterator[str]]] = {"gsm8k": gsm8k, "chat": role_play}


def prompts_of(kind: str, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of the first so many that take LONGEST tokens at most. Raises SystemExit where there are fewer."""
    messages = ([{"role": "user", "content": question}] for question in KINDS[kind]())
    rendered = (tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages)
    found = list(islice((ids for ids in rendered if len(ids) <= LONGEST), count))
    if len(found) < count:
        raise SystemExit(f"{kind}: {len(found)} prompts of at most {LONGEST} tokens, {count} are asked for")
    return found
