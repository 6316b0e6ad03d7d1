"""Rows in llm-foundry's form, given the fields of the published data sets again, which lm-eval's own tasks read.

`process_docs` of zero_shot.yaml: each takes a data set and gives one of as many rows, in the same order.
"""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
LETTERS = "ABCDE"


def rows_by(fields: Callable[[Row], Row]) -> Callable[[Any], Any]:
    """A function of a data set from one of a row; the row's own fields are dropped."""
    return lambda rows: rows.map(fields, remove_columns=rows.column_names)


def piqa_fields(row: Row) -> Row:
    """query: "Question: GOAL\\n"."""
    one, two = row["choices"]
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": one, "sol2": two, "label": row["gold"]}


def arc_fields(row: Row) -> Row:
    """query: "Question: QUESTION"."""
    labels = list(LETTERS[: len(row["choices"])])
    return {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


def winogrande_fields(row: Row) -> Row:
    """context_options: the sentence up to its gap, with either option in it. lm-eval puts the two together again, so an
    option may have the beginning with it, and the sentence may begin with its gap."""
    one, two = row["context_options"]
    return {"sentence": f"_ {row['continuation']}", "option1": one, "option2": two, "answer": str(row["gold"] + 1)}


def lambada_fields(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


piqa = rows_by(piqa_fields)
arc = rows_by(arc_fields)
winogrande = rows_by(winogrande_fields)
lambada = rows_by(lambada_fields)
