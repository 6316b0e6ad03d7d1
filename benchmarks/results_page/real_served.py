"""The page's parts of the real model behind vLLM: benchmarks.speed.parity and benchmarks.speed.drafts."""

from .real import MODEL, NOT_RUN, optional
from .tables import markdown, recorded

PARITY, DRAFTS = f"parity-{MODEL}", f"drafts-{MODEL}"


def parity() -> str:
    """A row a model: answers and tokens that are Hugging Face's likeliest, and the largest gap of a logit."""
    about = optional(PARITY)
    if about is None:
        return NOT_RUN
    rows = [
        [
            row["model"],
            f"{row['answers_of_likeliest_tokens']} of {row['answers']}",
            f"{row['likeliest_tokens']:,} of {row['tokens']:,}",
            f"{row['largest_gap']:.1e}" if row["largest_gap"] else "0",
        ]
        for row in about["rows"]
    ]
    head = ["model", "answers the same", "tokens the same", "largest gap of a logit"]
    return f"{markdown(head, rows)}\n\n{recorded(PARITY)}"


def drafts() -> str:
    """A row a draft: mean acceptance length by kind of prompt."""
    about = optional(DRAFTS)
    if about is None:
        return NOT_RUN
    kinds = list(dict.fromkeys(row["prompts"] for row in about["rows"]))
    length = {(row["draft"], row["prompts"]): row["acceptance_length"] for row in about["rows"]}
    names = dict.fromkeys(row["draft"] for row in about["rows"])
    rows = [[name, *(f"{length[name, kind]:.2f}" for kind in kinds)] for name in names]
    return f"{markdown(['draft', *kinds], rows)}\n\n{recorded(DRAFTS)}"


PARTS = {"real parity": parity, "real drafts": drafts}
