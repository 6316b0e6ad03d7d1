"""Progress bars: each says what is done, knows its total, and moves with every piece of work."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar:
    """A bar on the terminal that is gone afterwards."""

    def __init__(self, shown: tqdm):
        self._shown = shown

    def advance(self, *_: object) -> None:
        """One piece of work is done."""
        self._shown.update()

    def reach(self, done: int) -> None:
        """So many units are done; more than there are to do are not shown."""
        total = self._shown.total
        self._shown.update((done if total is None else min(done, total)) - self._shown.n)

    def show(self, record: dict) -> None:
        """A step is done: its loss, and the kept fraction where it has one, stand beside the bar."""
        self._shown.update()
        self._shown.set_postfix({name: f"{record[name]:.4f}" for name in ("kl", "kept") if name in record})


@contextmanager
def bar(what: str, total: int | None, unit: str = "step", done: int = 0, scale: bool = False) -> Iterator[Bar]:
    """what: is done; total: how many units, None where only the end of a text tells; done: of them, by an earlier run;
    scale: whether numbers are shown as 12k."""
    with tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=scale, leave=False) as shown:
        yield Bar(shown)
