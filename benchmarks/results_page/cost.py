"""Tables of what a conversion costs: by stage, by depth, by processes, by piece of linear algebra."""

from collections.abc import Callable
from functools import partial

from .tables import MIB, markdown, record, recorded

STAGES = (
    "calibration",
    "evaluation of the dense model",
    "decomposition",
    "the teacher",
    "FermiGrad",
    "--groups auto",
    "--refit",
    "writing",
    "healing",
    "evaluation",
)
BLOCKS = (4, 16, 32)  # of the shape whose memory is counted and measured


def stages() -> str:
    """Before and after, by stage: seconds and the anonymous resident set's height."""
    about = record("stages-smollm2")
    before, after = about["before"]["stages"], about["after"]["stages"]

    def cells(row: dict | None) -> list[str]:
        if row is None:
            return ["", ""]
        if "projected" in row:
            return [f"{row['seconds']:,.0f}, projected", ""]
        return [f"{row['seconds']:,.0f}", f"{row['resident_bytes'] / 1e9:.2f}"]

    names = [*before, *(name for name in after if name not in before)]
    rows = [[name, *cells(before.get(name)), *cells(after.get(name))] for name in sorted(names, key=stage_order)]
    sums = [sum(row["seconds"] for row in part.values()) for part in (before, after)]
    rows.append(["all", f"{sums[0]:,.0f}", "", f"{sums[1]:,.0f}", f"ratio {sums[1] / sums[0]:.2f}"])
    return markdown(["stage", "before, s", "peak, GB", "after, s", "peak, GB"], rows)


def stage_order(name: str) -> int:
    """As a conversion takes them."""
    return next(number for number, stage in enumerate(STAGES) if stage == name)


def counted() -> str:
    """Device and host memory are one on a CPU."""
    runs = {count: record(f"shaped-small-{count}-cpu")["stages"] for count in BLOCKS}

    def cell(row: dict) -> str:
        needed = row["counted_device_bytes"] + row["counted_host_bytes"]
        return f"{needed / 1e9:.2f} / {max(0, row['resident_growth_bytes']) / 1e9:.2f}"

    names = [name for name, row in runs[BLOCKS[0]].items() if row["counted_device_bytes"]]
    rows = [[name, *(cell(runs[count][name]) for count in BLOCKS)] for name in names]
    return markdown(["stage", *(f"{count} blocks" for count in BLOCKS)], rows)


def fermigrad_cost() -> str:
    rows = [
        [
            name,
            f"{row['dense_forward_backward_seconds']:.3f}",
            f"{row['fermigrad_step_seconds']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['factors_over_dense_parameters']:.2f}",
        ]
        for name, row in record("fermigrad-cost")["rows"].items()
    ]
    head = ["model", "dense forward and backward, s", "FermiGrad step, s", "ratio", "student's numbers over dense"]
    return markdown(head, rows)


def depth() -> str:
    keys = ("float32_bytes", "resident_growth_bytes", "live_tensor_bytes")
    rows = [
        [layers, *(f"{found[key] / MIB:,.0f} MiB" for key in keys)]
        for layers, found in record("depth")["depths"].items()
    ]
    return markdown(["layers", "model in float32", "growth of the anonymous resident set", "live tensors, peak"], rows)


def distributed() -> str:
    """Seconds by stage; then in what both runs agree."""
    runs = record("distributed-stdlib-2m")["runs"]
    stages = [[stage, *(f"{run['seconds'][stage]:.2f}" for run in runs)] for stage in runs[0]["seconds"]]
    stages.append(["all stages", *(f"{sum(run['seconds'].values()):.1f}" for run in runs)])
    stages.append(["perplexity after", *(f"{run['perplexity']['after']:.4f}" for run in runs)])
    gap = max(abs(a - b) for a, b in zip(*(run["kl"] for run in runs), strict=True))
    same = "the same" if runs[0]["ranks"] == runs[1]["ranks"] else "different"
    table = markdown(["seconds", *(f"processes: {run['processes']}" for run in runs)], stages)
    return f"{table}\n\nRanks and groups are {same}, and FermiGrad's losses are at most {gap:.0e} nats apart."


def pieces() -> str:
    """Seconds and rates of each piece by size; then what the rate at half the largest size predicts for it."""
    found = record("decomposition")["pieces"]
    sizes = list(next(iter(found.values())))
    rows = []
    for piece, of in found.items():
        cells = [f"{of[size]['seconds']:.3g} ({of[size]['rate'] / 1e9:.0f})" for size in sizes]
        rows.append([piece, *cells, f"{of[sizes[-1]]['predicted'] / of[sizes[-1]]['seconds']:.2f}"])
    return markdown(["seconds (GFLOP/s)", *sizes, f"predicted / measured at {sizes[-1]}"], rows)


def calls() -> str:
    """Whole calls at the largest width."""
    rows = []
    for name, found in record("decomposition")["calls"].items():
        call, width = name.rsplit(" ", 1)
        if width == "4096":
            seconds = f"{found['seconds']:.1f}", f"{sum(found['predicted'].values()):.1f}"
            rows.append([call, *seconds, f"{found['bytes'] / MIB:,.0f}"])
    return markdown(["call, 4096 channels", "seconds", "predicted", "MiB beside its arguments"], rows)


def projection(model: str) -> str:
    machines = record("decomposition")["projection"][model]
    seconds = {name: {stage: sum(parts.values()) for stage, parts in of.items()} for name, of in machines.items()}
    stages = list(next(iter(seconds.values())))
    rows = [[stage, *(f"{of[stage]:,.0f}" for of in seconds.values())] for stage in stages]
    cheap = [stage for stage in stages if stage not in ("groups: auto", "heal")]
    for title, counted in (("**all but groups: auto and heal**", cheap), ("all", stages)):
        rows.append([title, *(f"{sum(of[stage] for stage in counted):,.0f}" for of in seconds.values())])
    names = [name.replace("one H200, assumed rates, passes in", "H200 (assumed),") for name in machines]
    return markdown([model, *names], rows)


SOURCES = (
    "fermigrad-cost",
    "depth",
    "distributed-stdlib-2m",
    "decomposition",
    "stages-smollm2",
    *(f"shaped-small-{count}-cpu" for count in BLOCKS),
)
PARTS: dict[str, Callable[[], str]] = {
    "fermigrad-cost": fermigrad_cost,
    "depth": depth,
    "distributed": distributed,
    "stages": stages,
    "counted": counted,
    "pieces": pieces,
    "calls": calls,
    "projection of llama-3.1-8b": partial(projection, "llama-3.1-8b"),
    "projection of llama-3.1-70b": partial(projection, "llama-3.1-70b"),
    **{f"source of {name}": partial(recorded, name) for name in SOURCES},
}
