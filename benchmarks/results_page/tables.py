"""Records of benchmarks/results as Markdown tables. PARTS names them for page.md."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
FORMS = ("dense", "svd", "pivga")
MODELS = ("stdlib-2m", "stories260K", "kinds-11m")
RULE, PAPER, DEFAULT = "svd, uniform, separate (SVD-LLM's rule)", "FermiGrad as in the paper", "default"
# Their own code on the same protocol, without training: LEMS + KFAC-SVD at 10 %, then MPIFA
BEST_PEER = {"stories260K": {0.1: 5.100, 0.2: 7.933, 0.3: 14.74, 0.4: 26.06, 0.5: 40.40}}
RATE = "of dense's saturation"  # ends the names of cases of a request rate
MIB = 2**20


_read: dict[str, dict] = {}


def record(name: str) -> dict:
    if name not in _read:
        _read[name] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return _read[name]


def records_read() -> set[str]:
    return set(_read)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def recorded(name: str) -> str:
    """When, where and by which command the record was made, as far as it says."""
    about = record(name)
    machine = about["machine"]
    where = machine if isinstance(machine, str) else f"{machine['processor']}, threads: {machine['threads']}"
    when = f" on {about['date']}" if "date" in about else ""
    return f"Recorded{when} ({where}) by\n\n```\n{about['command']}\n```"


# Quality


def quality_records() -> dict[str, dict]:
    return {name: record(f"quality-{name}") for name in MODELS}


def removals(cells: dict) -> list[float]:
    return sorted({float(key.rsplit(" | ", 1)[1]) for key in cells if " | " in key})


def lost(cells: dict, method: str, remove: float) -> float:
    """Log-perplexity over dense."""
    return math.log(cells[f"{method} | {remove}"]["perplexity"] / cells["dense"]["perplexity"])


def quality(name: str) -> str:
    """Perplexity of every method and fraction, then the default's loss as a share of others'."""
    about = quality_records()[name]
    cells, fractions = about["cells"], removals(about["cells"])
    rows = []
    for method in about["protocol"]["methods"]:
        found = [cells.get(f"{method} | {remove}") for remove in fractions]
        if not any(found):
            continue
        rows.append([method, *(f"{cell['perplexity']:.3f}" if cell else "" for cell in found)])
    if name in BEST_PEER:
        rows.append(["best peer", *(f"{BEST_PEER[name][remove]:.3f}" for remove in fractions)])
    for label, other in (("SVD-LLM's rule", RULE), ("the paper's", PAPER)):
        shares = [
            f"{lost(cells, DEFAULT, remove) / lost(cells, other, remove):.2f}"
            if all(f"{method} | {remove}" in cells for method in (DEFAULT, other))
            else ""
            for remove in fractions
        ]
        rows.append([f"*default's loss, as a share of {label}*", *shares])
    dense = f"{cells['dense']['perplexity']:.3f}"
    return markdown([f"{name}, dense {dense}", *(f"{remove:.0%}" for remove in fractions)], rows)


def ablations(*names: str) -> str:
    """A row an option, a cell a value of it with its perplexity."""
    rows = []
    for name in names:
        for title, cells in record(f"ablations-{name}")["tables"].items():
            option, remove = title.rsplit(" | ", 1)
            values = [f"{value}: {cell['perplexity']:.3f}" for value, cell in cells.items()]
            model = name.removesuffix("-150-steps")
            rows.append([f"{model}, {float(remove):.0%}", f"`{option}`", *values, *[""] * (5 - len(values))])
    return markdown(["model, removed", "option", *[""] * 5], rows)


def healing() -> str:
    rows = record("healing-stdlib-2m")["rows"]
    steps = list(rows["uniform"])
    cells = [
        [ranks, *(f"{found[step]['perplexity']:.3f} ({found[step]['kl']:.4f})" for step in steps)]
        for ranks, found in rows.items()
    ]
    return markdown(["ranks", *(f"{step} steps" for step in steps)], cells)


def calibration() -> str:
    about = record("calibration")
    kinds = list(about["dense"])
    rows = [["dense perplexity", *(f"{about['dense'][kind]:.2f}" for kind in kinds)]]
    rows += [[text, *(f"{found[kind]:.3f}" for kind in kinds)] for text, found in about["lost"].items()]
    return markdown(["calibrated on", *kinds], rows)


def losslessness() -> str:
    def small(value: float) -> str:
        return "below 2e-9" if abs(value) < 2e-9 else f"{value:.2e}".replace("e-0", "e-")

    rows = []
    for name, kl in record("losslessness")["kl"].items():
        row = [name, small(kl["float32: svd form || pivga form, feedback"])]
        for dtype in ("bfloat16", "float16"):
            row += [
                small(kl[f"svd form: float32 || {dtype}"]),
                small(kl[f"svd form, float32 || pivga form, {dtype}, feedback"]),
                small(kl[f"{dtype}: svd form || pivga form, feedback"]),
            ]
        rows.append(row)
    head = ["model", "float32: svd to pivga", "bf16: exact to svd", "exact to pivga", "svd to pivga"]
    return markdown([*head, "fp16: exact to svd", "exact to pivga", "svd to pivga"], rows)


def harness() -> str:
    rows = record("harness")["rows"]
    models = list(dict.fromkeys(key.rsplit(", ", 1)[0] for key in rows))
    tasks = [("adjunct_island", "BLiMP adjunct island"), ("arc_easy_local", "ARC-easy")]
    cells = [
        [model, *(f"{rows[f'{model}, {engine}'][task]:.4f}" for task, _ in tasks for engine in ("vllm", "hf"))]
        for model in models
    ]
    return markdown(["model", *(f"{title}, {engine}" for _, title in tasks for engine in ("vLLM", "hf"))], cells)


def training() -> str:
    about = record("training-kinds-11m")
    last = about["steps"][-1]
    return (
        f"kinds-11m has {about['parameters']:,} parameters and saw {about['tokens_seen']:,} tokens, of a text of "
        f"{about['training_tokens']:,}.\nThe last recorded step is {last['step']}, after {last['seconds']:,} s; "
        f"the final validation loss is {about['final_validation_loss']}."
    )


# Serving


def speed_of(case: str) -> str | None:
    """The figure that forms are compared by: output tokens/s; with the prompt's where that is the work; none where
    requests come at a given rate."""
    if case.endswith(RATE):
        return None
    return "total_token_throughput" if case.startswith(("prefill", "offline")) else "output_throughput"


def median_of(runs: list[dict], form: str, figure: str) -> float:
    return statistics.median(run[figure] for run in runs if run["form"] == form)


def speed_ratio(runs: dict[str, list[dict]], case: str, form: str) -> float:
    """A form's tokens/s over dense's, of a case that is compared by them."""
    figure = speed_of(case)
    assert figure is not None, case
    return ratio(runs[case], form, "dense", figure)


def ratio(runs: list[dict], form: str, other: str, figure: str) -> float:
    """Median over repetitions of form / other in the same one."""
    of = {(run["form"], run["repeat"]): run[figure] for run in runs}
    return statistics.median(of[form, repeat] / of[other, repeat] for f, repeat in of if f == other)


def by_parameters(about: dict, form: str) -> float | None:
    """The ratio to dense that parameters promise: numbers a token is multiplied by, the head's included."""
    numbers = {f: model["layers"] + model["head"] for f, model in about["models"].items() if "layers" in model}
    return numbers["dense"] / numbers[form] if numbers else None


def load(name: str) -> str:
    """A row a case and form. Reached: of what parameters promise, by svd over dense, by pivga over svd."""
    about, rows = record(name), []
    for case, runs in about["runs"].items():
        for before, form in zip((None, *FORMS), FORMS, strict=False):
            cells, figure, promised = [case, form, "", "", "", ""], speed_of(case), by_parameters(about, form)
            if figure:
                cells[2:4] = f"{median_of(runs, form, figure):.1f}", f"{ratio(runs, form, 'dense', figure):.2f}"
            if figure and promised:
                cells[4] = f"{promised:.2f}"
                if before and (earlier := by_parameters(about, before)):
                    reached = ratio(runs, form, before, figure) * earlier / promised
                    cells[5] = f"{reached:.3f}"
            for typical, worst, digits in (("median_ttft_ms", "p99_ttft_ms", 0), ("median_tpot_ms", "p99_tpot_ms", 1)):
                there = typical in runs[0]
                figures = [f"{median_of(runs, form, each):.{digits}f}" for each in (typical, worst)] if there else []
                cells.append("{} ({})".format(*figures) if there else "")
            rows.append(cells)
    head = ["case", "form", "tokens/s", "over dense", "by parameters", "reached"]
    return markdown([*head, "first token ms (p99)", "further ms (p99)"], rows)


def sizes(name: str) -> str:
    """Weight memory, KV cache and start of each form."""
    rows = [
        [
            form,
            f"{about['weight_bytes'] / MIB:,.0f} MiB ({about['weights_from']})",
            f"{about['kv_cache_tokens']:,} tokens",
            f"{about['start_seconds']:.0f} s",
        ]
        for form, about in record(name)["models"].items()
    ]
    return markdown(["form", "weights", "KV cache", "start"], rows)


def load_names() -> list[str]:
    return sorted(path.stem for path in RESULTS.glob("load-*.json"))


def loads() -> str:
    """Every load test: its source, what its models take, its table."""
    return "\n\n".join(
        f"### {name.removeprefix('load-')}\n\n{recorded(name)}\n\n{sizes(name)}\n\n{load(name)}"
        for name in load_names()
    )


def layers() -> str:
    """Time a parameter of separate groups over that of one group: least and most over fractions and token counts."""
    prices: dict[tuple[str, str], list[float]] = {}
    for row in record("layers-wide-cpu")["prices"]:
        prices.setdefault((row["layer"], row["form"]), []).append(row["price"])
    rows = [[layer, form, f"{min(found):.2f} to {max(found):.2f}"] for (layer, form), found in prices.items()]
    return markdown(["fused layer of", "form", "price of separate groups"], rows)


def speculative() -> str:
    rows = record("speculative-stdlib-2m")["rows"]
    removed = sorted({row["remove"] for row in rows})
    length = {(row["ranks"], row["remove"]): row["acceptance_length"] for row in rows}
    cells = [[ranks, *(f"{length[ranks, remove]:.2f}" for remove in removed)] for ranks in ("uniform", "fermigrad")]
    return markdown(["ranks", *(f"{remove:.0%} removed" for remove in removed)], cells)


def soak() -> str:
    about = record("soak")
    busy, memory, left = about["concurrent_clients"], about["memory"], about["disconnects"]
    resident = memory["resident_megabytes_after_each_tenth"]
    lengths = ", ".join(str(length) for length in busy["prompt_tokens"])
    codes = ", ".join(f"{title} {code}" for title, code in about["malformed"].items())
    rows = [
        [
            f"{busy['clients']} concurrent clients, prompts of {lengths} tokens, some cancelled mid-stream",
            f"{busy['answers']} answers in {busy['seconds']} s, {busy['cancelled_mid_stream']} cancelled; "
            f"{busy['answers_with_other_tokens']} with other tokens than the same request alone; log-probabilities "
            f"differ by {busy['largest_logprob_gap']} at most (bound {busy['tolerance']})",
        ],
        [
            f"{memory['requests']:,} requests",
            f"{memory['seconds']} s; resident memory of all processes {resident[0]:,} MB after the first tenth, "
            f"{resident[4]:,} after half, {resident[-1]:,} at the end",
        ],
        [f"{len(about['malformed'])} kinds of malformed request", f"{codes}; the server goes on"],
        [
            f"{left['clients']} clients that disconnect mid-stream",
            f"{left['tokens_generated']:.0f} tokens generated of {left['tokens_asked_for']:,} asked for, "
            f"{left['requests_left_running']:.0f} requests left running",
        ],
    ]
    for run in about["sigterm"]:
        outcomes = "; ".join(f"{title}: {count}" for title, count in run["outcomes"].items())
        options = " ".join(["SIGTERM", *run["options"]])
        what = f"{options}, {run['model']}, {run['in_flight']} requests in flight"
        rows.append([what, f"{outcomes}; exit code {run['exit_code']} after {run['seconds']} s"])
    return markdown(["what", "seen"], rows)


def massive_energies() -> str:
    rows = [
        [name, *(f"{row[key]:,.0f}" for key in ("all tokens", "without the first")), f"{row['share of the first']:.1%}"]
        for name, row in record("massive")["energies"].items()
    ]
    return markdown(["input of", "all tokens", "without first tokens", "share of first tokens"], rows)


def massive_perplexity() -> str:
    found = record("massive")["perplexity"]
    removed = list(next(iter(found.values())))
    rows = [[name, *(f"{row[remove]:.2f}" for remove in removed)] for name, row in found.items()]
    return markdown(["calibration", *(f"{float(remove):.0%} removed" for remove in removed)], rows)


def precision() -> str:
    names = ("accumulation", "root", "forming", "eigh", "products", "damping")
    rows = [
        [matrices, *(f"{found[name]:.0e}" for name in ("spread", *names))]
        for matrices, found in record("precision")["excess"].items()
    ]
    return markdown(
        ["Gram matrices", "spread", "sums of x^T x", "roots", "forming", "eigh", "products", "*damping*"], rows
    )


# README


def served_in_words(remove: float) -> str:
    """Weights and tokens a second of the wide model, a sentence a line."""
    about, case = record(f"load-wide-{remove}"), "decode, 16 concurrent"
    held = {form: f"{about['models'][form]['weight_bytes'] / MIB:,.0f}" for form in FORMS}
    ratios = {form: f"{speed_ratio(about['runs'], case, form):.2f}" for form in FORMS}
    return (
        f"A random model, 2,048 wide, gives {ratios['svd']} times dense's tokens/s to 16 clients "
        f"({about['machine']['processor']})\n"
        f"with {remove:.0%} removed in svd form, and {ratios['pivga']} times in pivga form of the same ranks.\n"
        f"It holds {held['dense']} MiB of weights dense, {held['svd']} in svd and {held['pivga']} in pivga form."
    )


README_FRACTIONS = (0.2, 0.4)
SOURCES = (
    *(f"quality-{name}" for name in MODELS),
    "ablations-stories260K-150-steps",
    "ablations-stories260K",
    "healing-stdlib-2m",
    "calibration",
    "losslessness",
    "harness",
    "layers-wide-cpu",
    "speculative-stdlib-2m",
    "soak",
    "precision",
    "massive",
)
PARTS: dict[str, Callable[[], str]] = {
    **{f"quality-{name}": partial(quality, name) for name in MODELS},
    "ablations, 150 steps": partial(ablations, "stories260K-150-steps"),
    "ablations, 64 steps": partial(ablations, "stories260K", "stdlib-2m"),
    "healing": healing,
    "calibration": calibration,
    "losslessness": losslessness,
    "harness": harness,
    "training": training,
    "loads": loads,
    "layers": layers,
    "speculative": speculative,
    "soak": soak,
    "precision": precision,
    "massive energies": massive_energies,
    "massive perplexity": massive_perplexity,
    **{f"source of {name}": partial(recorded, name) for name in SOURCES},
}
