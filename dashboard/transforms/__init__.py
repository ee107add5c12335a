"""From logged points to the content of a chart or a table. Pure functions of arrays: nothing is read, kept or drawn."""

from __future__ import annotations

from .axes import COUNTERS, by_counter, by_elapsed, by_step
from .curve import Curve, Floats
from .groups import Band, band, broken, stretches
from .params import TASK, differing, legends, reached, same_value, seed_groups, total_steps
from .smoothing import MOST_SMOOTHING, smooth
from .summaries import Goal, Row, Summary, at_step, goal, rows, summarise
from .thinning import Grid, Marks, grid, log_axis, marks, thin
from .tradeoffs import first_reaching, pareto

__all__ = [
    "COUNTERS",
    "MOST_SMOOTHING",
    "TASK",
    "Band",
    "Curve",
    "Floats",
    "Goal",
    "Grid",
    "Marks",
    "Row",
    "Summary",
    "at_step",
    "band",
    "broken",
    "by_counter",
    "by_elapsed",
    "by_step",
    "differing",
    "first_reaching",
    "goal",
    "grid",
    "legends",
    "log_axis",
    "marks",
    "pareto",
    "reached",
    "rows",
    "same_value",
    "seed_groups",
    "smooth",
    "stretches",
    "summarise",
    "thin",
    "total_steps",
]
