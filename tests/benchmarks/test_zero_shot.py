"""The zero-shot tasks: rows of llm-foundry get their published fields back, and lm-eval's own tasks read them.

Expected prompts are written by hand from lm-eval's task files and the published rows.
"""

import json
import runpy

import pytest

from tests.support import ROOT, SHARED

TASKS = ROOT / "benchmarks" / "quality" / "tasks"
ROWS = SHARED / "tasks"
fields = runpy.run_path(str(TASKS / "own_fields.py"))
needs_rows = pytest.mark.skipif(not ROWS.is_dir(), reason="the shared data are not beside the repository")

COUNTS = {
    "piqa": 1838,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 2000,
    "winogrande": 1267,
    "lambada_openai": 5153,
}
# Of the first row: what is put before each choice, the choices, and the right one
FIRST = {
    "piqa": (
        "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:",
        [
            " Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips, you will"
            " also need to supply it with a water bottle and a food dish.",
            " Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans material, you"
            " will also need to supply it with a water bottle and a food dish.",
        ],
        0,
    ),
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        [
            " Sunlight is the source of energy for nearly all ecosystems.",
            " Most ecosystems are found on land instead of in water.",
            " Carbon dioxide is more available than other gases.",
            " The producers in all ecosystems are plants.",
        ],
        0,
    ),
    "arc_challenge": (
        "Question: An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most"
        " likely effect of this increase in rotation?\nAnswer:",
        [
            " Planetary density will decrease.",
            " Planetary years will become longer.",
            " Planetary days will become shorter.",
            " Planetary gravity will become stronger.",
        ],
        2,
    ),
    "hellaswag": (
        "Clean and jerk: A lady walks to a barbell. She bends down and grabs the pole. The lady",
        [
            " swings and lands in her arms.",
            " pulls the barbell forward.",
            " pulls a rope attached to the barbell.",
            " stands and lifts the weight over her head.",
        ],
        3,
    ),
}


def test_fields_of_each_form():
    """Rows as llm-foundry has them; the goal keeps what is its own of "Question: " and of line breaks."""
    row = {"query": "Question: What?\n\n", "choices": ["one", "two"], "gold": 1}
    assert fields["piqa_fields"](row) == {"goal": "What?\n", "sol1": "one", "sol2": "two", "label": 1}
    row = {"query": "Question: Question: Why?", "choices": ["x", "y", "z"], "gold": 2}
    assert fields["arc_fields"](row) == {
        "question": "Question: Why?",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
    row = {"context_options": ["She told Sarah", "She told Sam"], "continuation": "to go.", "gold": 0}
    made = fields["winogrande_fields"](row)
    assert made == {
        "sentence": "_ to go.",
        "option1": "She told Sarah",
        "option2": "She told Sam",
        "answer": "1",
    }
    assert fields["lambada_fields"]({"context": "He ate an", "continuation": "egg"}) == {"text": "He ate an egg"}


@needs_rows
@pytest.mark.parametrize("name", ["piqa", "arc_easy", "arc_challenge", "winogrande", "lambada_openai"])
def test_nothing_is_lost_in_any_row(name):
    """By lm-eval's templates, written here again, each row gives the texts that llm-foundry has."""
    rows = [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == COUNTS[name]
    of = fields[{"arc_easy": "arc_fields", "arc_challenge": "arc_fields"}.get(name, f"{name.split('_')[0]}_fields")]
    for row in rows:
        made = of(row)
        if name == "piqa":
            assert (f"Question: {made['goal']}\n", [made["sol1"], made["sol2"]]) == (row["query"], row["choices"])
            assert made["label"] == row["gold"]
        elif name == "winogrande":
            before, after = made["sentence"].split("_")
            assert [before + made["option1"], before + made["option2"]] == row["context_options"]
            assert (after.strip(), int(made["answer"]) - 1) == (row["continuation"], row["gold"])
        elif name == "lambada_openai":
            assert made["text"].rsplit(" ", 1) == [row["context"], row["continuation"]]
        else:
            assert (f"Question: {made['question']}", made["choices"]["text"]) == (row["query"], row["choices"])
            assert made["choices"]["label"].index(made["answerKey"]) == row["gold"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """lm-eval's tasks by name, with the requests of their first two rows."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra [eval])")
    if not ROWS.is_dir():
        pytest.skip("the shared data are not beside the repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        found = TaskManager(include_path=str(TASKS)).load(["zero_shot"])["tasks"]
        for task in found.values():
            task.build_all_requests(limit=2, rank=0, world_size=1)
    return found


def asked(task, row: int) -> list[tuple[str, str]]:
    return [request.arguments for request in task.instances if request.doc_id == row]


@pytest.mark.long
def test_the_rules_are_lm_evals_own(tasks):
    """Metrics, templates and delimiters are not changed, and all rows are there, without examples before them."""
    assert set(tasks) == set(COUNTS)
    metrics = {name: [metric["metric"] for metric in task.config.metric_list] for name, task in tasks.items()}
    both = ["acc", "acc_norm"]
    assert metrics == dict.fromkeys(("piqa", "arc_easy", "arc_challenge", "hellaswag"), both) | {
        "winogrande": ["acc"],
        "lambada_openai": ["perplexity", "acc"],
    }
    for name, task in tasks.items():
        assert len(task.eval_docs) == COUNTS[name], name
        assert (task.config.target_delimiter, task.config.num_fewshot or 0) == (" ", 0), name
        source = task.config.metadata["config_source"]
        assert f"lm_eval/tasks/{name.split('_')[0]}/" in source, source


@pytest.mark.long
@pytest.mark.parametrize("name", FIRST)
def test_prompts_of_multiple_choice(tasks, name):
    context, choices, gold = FIRST[name]
    assert asked(tasks[name], 0) == [(context, choice) for choice in choices]
    task, doc = tasks[name], tasks[name].eval_docs[0]
    target = task.doc_to_target(doc)
    assert (int(target) if str(target).isdigit() else task.doc_to_choice(doc).index(target)) == gold


@pytest.mark.long
def test_hellaswag_loses_the_marks_of_wikihow(tasks):
    """Its row 668: a title is a full stop, other marks are spaces, double ones are single; a mark at a choice's start
    leaves its space."""
    task = tasks["hellaswag"]
    doc = task.eval_docs[668]
    assert task.doc_to_text(doc) == (
        "Personal Care and Style: How to become a fashion consultant. Obtain your high school diploma or ged. This job"
        " requires a high school diploma or equivalent, so make sure to apply yourself and finish school. If your high"
        " school offers these classes, take art, design, and sewing to familiarize yourself with foundational concepts"
        " in fashion."
    )
    assert task.doc_to_choice(doc)[3] == (
        " Earn a bachelor's degree in a fashion-related field. Degrees for the fashion industry include art, fashion"
        " merchandising, and marketing."
    )
    assert int(task.doc_to_target(doc)) == 3


@pytest.mark.long
def test_winogrande_scores_what_follows_the_gap(tasks):
    """Partial scoring: either option in the sentence's beginning, and the same rest behind it."""
    task = tasks["winogrande"]
    beginnings = [f"Sarah was a much better surgeon than Maria so {name}" for name in ("Sarah", "Maria")]
    assert asked(task, 0) == [(beginning, " always got the easier cases.") for beginning in beginnings]
    assert asked(task, 1) == [(beginning, " always got the harder cases.") for beginning in beginnings]
    assert [task.doc_to_text(task.eval_docs[row]) for row in range(2)] == [1, 0]


@pytest.mark.long
def test_lambada_asks_for_the_last_word(tasks):
    ((context, word),) = asked(tasks["lambada_openai"], 1)
    assert context.endswith('"I can make it there on my own,') and word == " Shane"
    assert asked(tasks["lambada_openai"], 0)[0][1] == " signs"
