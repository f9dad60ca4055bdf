"""Sessions that end before all runs are trained, as on Kaggle and Colab: until when, and what is whole by then."""

import math
import time
from collections.abc import Collection
from dataclasses import replace

from step2.runs import Comparison, Run


def session_end(max_hours: float | None) -> float:
    """Return when training has to be over, in seconds since 1970: max_hours from now, never for None."""
    return math.inf if max_hours is None else time.time() + 3600 * max_hours


def whole_part(comparison: Comparison, missing: Collection[Run]) -> Comparison:
    """Return the comparison of the folds of which no run is missing, neither a variant's nor the control's.

    Of several repeats those that are whole, else the folds of one, so that all slices are tested equally
    often. RuntimeError, with what to do, where there is no whole fold.
    """
    if not missing:
        return comparison
    lacking = {(run.repeat, run.fold) for run in missing}
    whole = [place for place in comparison.places if place not in lacking]
    repeats = [[place for place in whole if place[0] == 1 + i] for i in range(comparison.settings.repeats)]
    finished = [place for of in repeats if len(of) == comparison.settings.folds for place in of]
    kept = finished or max(repeats, key=len)
    if not kept:
        count = len(comparison.runs)
        done = f"{count - len(missing)} of {count} runs are trained, no whole fold"
        advice = "run the notebook again, it goes on after each run's last whole epoch"
        raise RuntimeError(f"max_hours is over, {done}: {advice}; raise max_hours if not one epoch ended")
    return replace(comparison, only=tuple(kept))


def part_in_words(comparison: Comparison) -> str:
    """Return which part of the declared comparison this is, '3 of 5 folds'; empty where it is all of it."""
    folds, repeats = comparison.settings.folds, comparison.settings.repeats
    there = len({repeat for repeat, _ in comparison.places})
    if len(comparison.places) == folds * repeats:
        return ""
    if len(comparison.places) == folds * there:
        return f"{there} of {repeats} repeats"
    return f"{len(comparison.places)} of {folds} folds" + f" of one of {repeats} repeats" * (repeats > 1)
