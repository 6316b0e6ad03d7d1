"""How many numbers does a process hold of a decoder block of Llama-3.1-8B under tensor parallelism?

    python -m benchmarks.cost.tensor_parallel

By the plugin's own shard arithmetic, uniform ranks, joint groups; prints the table of docs/serving.md. Tested against
loaded layers in tests/vllm_plugin/test_tensor_parallel.py.
"""

from fermisvd.budget import Budget, Form
from fermisvd.format import Group
from fermisvd.groups import LinearGroup
from fermisvd_vllm.kinds import part_of
from fermisvd_vllm.layout import LayerSizes, numbers_held, slots_of

HIDDEN, HEAD, HEADS, KV_HEADS, WIDE = 4096, 128, 32, 8, 14336
LAYERS = {
    "qkv": (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD),
    "o": (HIDDEN,),
    "gate_up": (WIDE, WIDE),
    "down": (HIDDEN,),
}
INPUTS = {"qkv": HIDDEN, "o": HEADS * HEAD, "gate_up": HIDDEN, "down": WIDE}
SIZES, REMOVED = (1, 2, 4, 8), (0.2, 0.4)


def held(layer: str, rank: int, form: Form, tp_size: int) -> tuple[int, int]:
    """(sharded, replicated) numbers of one layer in one process."""
    row_parallel = layer in ("o", "down")
    side = "rows" if row_parallel else "columns"
    members = tuple(f"{layer}.{i}" for i in range(len(LAYERS[layer])))
    group = Group(members=members, form=form, side=side if form == "pivga" else None, rank=rank)
    sections = [((m, m if row_parallel else m // tp_size),) for m in LAYERS[layer]]  # kv heads: 8 processes at most
    columns = INPUTS[layer], INPUTS[layer] // tp_size if row_parallel else INPUTS[layer]
    sizes = LayerSizes(sections, columns, "row" if row_parallel else "column", tp_size, layer)
    return numbers_held(slots_of([part_of(range(len(members)), group)], sizes))


def main() -> None:
    print("| form, removed | " + " | ".join(f"TP {size}" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    groups = [LinearGroup((name,), (sum(rows),), INPUTS[name], "columns", name) for name, rows in LAYERS.items()]
    dense = sum(group.dense_parameters for group in groups)
    print("| dense | " + " | ".join(f"{dense / size / 1e6:.1f} M" for size in SIZES) + " |")
    for form in ("svd", "pivga"):
        for removed in REMOVED:
            budget = Budget.removing(removed, form)
            ranks = budget.ranks(groups, budget.uniform_ranks(groups))
            cells = []
            for size in SIZES:
                sharded, replicated = map(
                    sum, zip(*(held(g.name, r, form, size) for g, r in zip(groups, ranks, strict=True)), strict=True)
                )
                total = sharded + replicated
                cells.append(
                    f"{total / 1e6:.1f} M, {replicated / 1e6:.1f} replicated ({total / (dense / size):.2f} of dense)"
                )
            print(f"| {form}, {removed:.0%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
