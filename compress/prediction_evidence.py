"""What a search for predicted steps tried, as the plan's evidence: a row a part, in the terms of the plan's metric.

In: a `Search` and the candidate that ships. Out: `Evidence`. It decides nothing; see prediction_search.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from latentrelay.compress.plan import Evidence
from latentrelay.compress.prediction_candidates import Candidate
from latentrelay.compress.prediction_outcome import METRIC, relative_error
from latentrelay.compress.prediction_search import Search


def parts_of(search: Search, shipped: Candidate, place: str = "") -> Iterator[Evidence]:
    """A row a part: its best variant against what it was added to; kept where it is in what ships. `place` stands
    before the part's name."""
    for part, (without, with_it, candidate) in search.parts.items():
        gained = with_it.over(without)[1] > 0.0
        kept: Literal["kept", "dropped"] = (
            "kept" if gained and search.best == shipped and _has(part, candidate, shipped) else "dropped"
        )
        yield Evidence(
            f"prediction, {candidate.target}: {place}{part}",
            relative_error(without.mean),
            relative_error(with_it.mean),
            kept,
            METRIC,
        )


def _has(part: str, candidate: Candidate, shipped: Candidate) -> bool:
    """Whether what ships has the part that the candidate brought in."""
    if part == "order above 0":
        return shipped.spec.orders[-1] > 0
    if part == "mask policy":
        return candidate.policy == shipped.policy
    if part == "choice per token":
        return shipped.metric is not None
    if part.startswith("adjusted grid"):
        return shipped.grid is not None
    return shipped.rectify is not None
