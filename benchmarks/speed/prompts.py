"""Prompts that people give: maths problems and role play, from the shared data, through a model's chat template."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tests.support import SHARED


def gsm8k() -> Iterator[str]:
    for line in (SHARED / "tasks" / "gsm8k.test.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["question"]


def role_play() -> Iterator[str]:
    for row in json.loads((SHARED / "chat" / "gpteacher.roleplay-instruct.json").read_text(encoding="utf-8")):
        yield "\n".join(part for part in (row["instruction"], row["input"]) if part)


KINDS: dict[str, Callable[[], Iterator[str]]] = {"gsm8k": gsm8k, "chat": role_play}


def prompts_of(kind: str, tokenizer: Any, count: int, longest: int) -> list[list[int]]:
    """Token ids of the first so many that take `longest` tokens at most. Raises SystemExit where there are fewer."""
    found: list[list[int]] = []
    for question in KINDS[kind]():
        message = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        if len(ids) <= longest:
            found.append(ids)
        if len(found) == count:
            return found
    raise SystemExit(f"{kind}: {len(found)} prompts of at most {longest} tokens, {count} are asked for")
