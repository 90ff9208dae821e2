"""Tables of runs, of a run's attempts, and of what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from job.cloud.machines import Prices
from job.cloud.status import AttemptStatus, RunStatus, status_of
from job.errors import JobError
from job.storage import ObjectStore

WIDTH = 140
"""Of a table that is not for a terminal."""


def print_runs(runs: Sequence[RunStatus], place: str, prices: Prices) -> None:
    """A line for each run at a place."""
    place = place.rstrip("/")
    table = _table(
        *("run", "state", "iteration", "val mIoU", "images/s", "attempts", "left", "cost", "saved")
    )
    for run in runs:
        table.add_row(
            run.run.removeprefix(f"{place}/"),
            run.state,
            _progress(run),
            _decimal(run.val_miou, 4),
            _decimal(run.images_per_s, 1),
            str(len(run.attempts)),
            _duration(run.seconds_left),
            _run_usd(run),
            _saved(run),
        )
    console = _console()
    console.print(f"below {place}")
    console.print(table)
    for run in runs:
        if run.detail:
            console.print(f"{run.run.removeprefix(f'{place}/')}: {run.detail}")
    _notes(prices, console)


def print_run(run: RunStatus, prices: Prices) -> None:
    """All about one run."""
    console = _console()
    facts = {
        "run": run.run,
        "state": f"{run.state}: {run.detail}" if run.detail else run.state,
        "job": run.job_id,
        "iteration": _progress(run),
        "best val mIoU": _decimal(run.val_miou, 4),
        "images/s": _decimal(run.images_per_s, 1),
        "time left": _duration(run.seconds_left),
        "goodput": f"{run.goodput:.0%}" if run.goodput is not None else "-",
        "cost so far": _cost(run),
    }
    for name, value in facts.items():
        if value not in ("", "-"):
            console.print(f"{name:<14} {value}")
    if run.attempts:
        console.print(_attempts(run.attempts))
    _print_unrecorded(run, console)
    _notes(prices, console)


def print_cost(runs: Sequence[RunStatus], prices: Prices) -> None:
    """GPU hours and dollars of each run and attempt, and of all together."""
    console = _console()
    for run in runs:
        console.print(run.run)
        if run.attempts:
            console.print(_attempts(run.attempts))
        costs = cost_of(run)
        console.print(
            f"GPU hours {costs['gpu_hours']:.2f}: useful {costs['useful']:.2f}, "
            f"trained again {costs['redone']:.2f}, idle {costs['idle']:.2f}"
            + (f"; goodput {run.goodput:.0%}" if run.goodput is not None else "")
        )
        if _cost(run) != "-":
            console.print(f"cost {_cost(run)}")
        _print_unrecorded(run, console)
    known = [run for run in runs if run.usd is not None]
    if len(runs) > 1 and known:
        complete = all(run.usd is not None and run.usd_is_complete for run in runs)
        bound = "" if complete else "at least "
        console.print(f"together {bound}{_usd(sum(run.usd or 0 for run in known))}")
    _notes(prices, console)


def cost_of(run: RunStatus) -> dict[str, Any]:
    """GPU hours and dollars of a run; dollars are None where nobody knows them."""
    hours = {
        key: sum(getattr(one, field) * one.gpus for one in run.attempts) / 3600
        for key, field in (
            ("gpu_hours", "seconds"),
            ("useful", "useful_s"),
            ("redone", "redone_s"),
            ("idle", "idle_s"),
        )
    }
    return {
        "run": run.run,
        **hours,
        "goodput": run.goodput,
        "usd": run.usd,
        "usd_is_complete": run.usd_is_complete,
        "on_demand_usd": run.on_demand_usd,
        "attempts": [vars(one) for one in run.attempts],
        "unrecorded": vars(run.unrecorded) if run.unrecorded else None,
    }


def cost_sentences(store: ObjectStore) -> list[str]:
    """What a run has cost, for its report; where nobody knows it, that."""
    prices = Prices()
    try:
        found = status_of(store, prices)
    except JobError as error:
        return [f"What it cost is not known: {error.message}."]
    if not any(one.instance_type for one in found.attempts):
        return []  # no machine that is paid by the hour
    said = f"Cost {_run_usd(found)}"
    if found.saved_usd is not None:
        said += f", saved against on demand {_saved(found)}"
    return [f"{said}.", *(f"Note: {note}." for note in prices.notes)]


def _attempts(attempts: Sequence[AttemptStatus]) -> Table:
    table = _table(
        "attempt", "began", "machine", "time", "useful", "again", "idle", "cost", "ended"
    )
    for one in attempts:
        machine = " ".join(filter(None, (one.instance_type, one.life_cycle))) or "-"
        machine = f"{one.nodes} x {machine}" if one.nodes > 1 else machine
        table.add_row(
            str(one.number),
            time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.started)),
            machine,
            *(_duration(value) for value in (one.seconds, one.useful_s, one.redone_s, one.idle_s)),
            _usd(one.usd, one.on_demand_usd),
            one.ended or "goes on",
        )
    return table


def _print_unrecorded(run: RunStatus, console: Console) -> None:
    if run.unrecorded is not None:
        one = run.unrecorded
        console.print(
            f"not counted: {one.tries} tries of its jobs that never came to the run, "
            f"{_duration(one.seconds)} together" + (f"; the last: {one.ended}" if one.ended else "")
        )


def _console() -> Console:
    """Of the terminal's width, or wide enough where there is none.

    What others wrote is printed as it is: a bracket in it is no markup.
    """
    width = None if Console().is_terminal else WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _notes(prices: Prices, console: Console) -> None:
    for note in prices.notes:
        console.print(f"note: {note}")


def _progress(run: RunStatus) -> str:
    if run.iterations is None:
        return str(run.iteration)
    return f"{run.iteration}/{run.iterations} ({run.iteration / run.iterations:.0%})"


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _usd(value: float | None, at_most: float | None = None) -> str:
    """Dollars; where only the price on demand is known, that as an upper bound."""
    if value is None:
        return "-" if at_most is None else f"< ${max(at_most, 0.01):.2f}"
    return f"${value:.2f}"


def _cost(run: RunStatus) -> str:
    cost = _run_usd(run)
    return cost if run.usd is None else f"{cost}, saved against on demand {_saved(run)}"


def _run_usd(run: RunStatus) -> str:
    if run.usd is not None and not run.usd_is_complete:
        return f"at least {_usd(run.usd)}"
    return _usd(run.usd, run.on_demand_usd)


def _saved(run: RunStatus) -> str:
    if run.usd is None or run.saved_usd is None:
        return "-"
    of_known = run.usd + run.saved_usd
    return f"${run.saved_usd:.2f} ({run.saved_usd / of_known:.0%})" if of_known else "-"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"
