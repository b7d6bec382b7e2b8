"""The choice and its nearest rivals on the test seeds.

The choice was made on validation seeds, where it is flattered and its rivals are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autofr.measure.quality import times_interval
from autofr.policy import Interval, Policy
from autofr.runtime.points import Pipe
from autofr.runtime.sampler import Samples
from autofr.search.compare import rivals
from autofr.search.evaluate import interval, latent_errors
from autofr.search.result import Row
from autofr.search.verify import drawn_with

Tested = tuple[Samples, Samples]
"""What the teacher and the choice drew with the test seeds."""


def on_test(
    pipe: Pipe,
    rows: Sequence[Row],
    policies: Mapping[str, Policy],
    samples: Tested,
    *,
    seeds: Sequence[int],
    batch: int,
    on_progress: Callable[[int, int], None],
) -> list[Row]:
    """The rows, with errors on the test seeds for the choice and for its rivals: of each kind as
    fast, the nearest one on the validation seeds.

    `policies` are those of published rows, by name.
    Raises: MeasurementError when a rival draws NaN.
    """
    teacher, chosen = samples
    base = latent_errors(chosen.latents, teacher.latents)
    named = [row.name for row in rivals(rows) if row.name in policies]

    def tested(row: Row) -> Row:
        if row.group == "chosen":
            return row.model_copy(update={"test_error": interval(base)})
        if row.name not in named:
            return row
        before, total = named.index(row.name) * len(seeds), len(named) * len(seeds)

        def on_drawn(done: int, _: int) -> None:
            on_progress(before + done, total)

        found, _ = drawn_with(pipe, policies[row.name], seeds, batch, on_drawn)
        errors = latent_errors(found.latents, teacher.latents)
        times = None
        if base.all():
            value, low, high = times_interval(errors, base)
            times = Interval(value=value, low=low, high=high)
        return row.model_copy(update={"test_error": interval(errors), "times_chosen": times})

    return [tested(row) for row in rows]
