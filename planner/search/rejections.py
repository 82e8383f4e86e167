"""What rules out shapes, how many each rule does, and why none may be left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from planner.job.problem import PlanningProblem
from planner.strategy.estimate import Rejected


class Rejections:
    """Shapes that were ruled out: their number by rule, and of each rule the first in order of shapes."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._nearest: dict[str, tuple[int, Rejected]] = {}

    def add(self, rejected: Rejected, order: int, shapes: int = 1) -> None:
        """Counts shapes that a rule rules out; `order` is the place of the first of them."""
        self.counts[rejected.rule] += shapes
        known = self._nearest.setdefault(rejected.rule, (order, rejected))
        if order < known[0]:
            self._nearest[rejected.rule] = order, rejected

    def add_made(self, rule: str, make: Callable[[], Rejected], order: int, shapes: int = 1) -> None:
        """The same, where the words are only made if they are kept."""
        known = self._nearest.get(rule)
        if known is None or order < known[0]:
            self.add(make(), order, shapes)
        else:
            self.counts[rule] += shapes

    def why_infeasible(self, problem: PlanningProblem, shapes: int) -> str:
        """What stands in the way of every shape, the rule that most break first."""
        model, cluster = problem.model.name, problem.cluster.name
        lines = [f"no feasible plan among {shapes} shapes for {model} on {cluster}."]
        for rule, (_, nearest) in sorted(
            self._nearest.items(), key=lambda item: (-self.counts[item[0]], item[1][0])
        ):
            lines.append(f"  {rule} ({self.counts[rule]}): {nearest.detail}")
            if nearest.legal:
                lines.append(f"    legal here: {nearest.legal}")
        if self.counts["memory"]:
            lines.append(
                "What would help: more devices, a larger --memory-limit, a shorter --seq, or an optimizer "
                "with less state."
            )
        return "\n".join(lines)
