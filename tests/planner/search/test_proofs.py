"""What ruled out one shape, tried on another: it never rules out what the other's own programme does not."""

from __future__ import annotations

import itertools
import random

import pytest

from planner.search.bounds.relaxation import EACH, KNOWN, Proof, Proofs, least_sum
from planner.search.programme.stages import Sizes, StageSpace
from planner.strategy.strategy import Degrees, Schedule
from tests.planner.rank_samples import bounds_of
from tests.planner.small_shapes import PIPES, drawn_shapes, tightened

ANY = float("inf")


def test_the_least_sum_is_that_of_all_ways_to_deal_blocks() -> None:
    """Within limits of stages and ranks, or none where there is no way."""
    draw, none = random.Random(3), 0
    for _ in range(300):
        ranks, chunks = draw.randint(1, 3), draw.randint(1, 3)
        rank_of = [stage % ranks for stage in range(ranks * chunks)]
        stages = tuple((low, low + draw.randint(0, 2)) for low in (draw.randint(0, 1) for _ in rank_of))
        by_rank = tuple((low, low + draw.randint(0, 3)) for low in (draw.randint(0, 4) for _ in range(ranks)))
        layers, each = draw.randint(1, 9), [draw.uniform(-1, 1) for _ in rank_of]
        ways = [
            sum(n * own for n, own in zip(way, each, strict=True))
            for way in itertools.product(*(range(low, high + 1) for low, high in stages))
            if sum(way) == layers
            and all(
                low <= sum(n for n, own in zip(way, rank_of, strict=True) if own == rank) <= high
                for rank, (low, high) in enumerate(by_rank)
            )
        ]
        found = least_sum(each, Sizes(stages, by_rank), rank_of, layers)
        assert found == pytest.approx(min(ways, default=ANY))
        none += not ways
    assert 20 < none < 280


def fresh(space: StageSpace, limits: StageSpace | None = None) -> StageSpace:
    """The same space without what it worked out, perhaps with the limits of another."""
    return StageSpace(space.model, space.shape, (limits or space).limits_bytes, space.books)


@pytest.mark.parametrize("pipe", PIPES)
def test_a_proof_of_one_shape_rules_out_no_more_than_the_programme_of_another(pipe: tuple[str, int]) -> None:
    """With more memory and with less; and it rules out much of what that does."""
    compared = proven = 0
    for seed in range(6):
        for roomy in drawn_shapes(seed, pipe):
            sizes = bounds_of(roomy).sizes(ANY)
            assert sizes is not None
            spaces = [tightened(roomy, share) for share in (0.2, 0.4, 0.8, 3.0)]
            for one, other in itertools.permutations(spaces, 2):
                KNOWN.pop(one.model, None)
                least_s, others_s = (
                    bounds_of(fresh(each)).relaxation.within(ANY, sizes, 0).bound_s for each in (one, other)
                )
                if ANY in (least_s, others_s):
                    continue
                KNOWN.pop(one.model, None)
                assert (
                    bounds_of(fresh(one)).relaxation.within(least_s * 0.99, sizes, 0).bound_s
                    >= least_s * 0.98
                )
                for factor in (0.9, 0.999, 1.001, 1.1):
                    said = bounds_of(fresh(other)).relaxation._proven(
                        others_s * factor - other.optimizer_s, sizes
                    )
                    assert not said or factor < 1, (seed, other.degrees.label(), factor)
                    proven += said
                    compared += factor < 1
            KNOWN.pop(roomy.model, None)
    assert proven > compared / 4 > 5, (proven, compared)


def test_the_last_proofs_of_a_table_are_kept() -> None:
    """Of other tables, and of as many blocks of other kinds, there are others."""
    import numpy as np

    proofs = Proofs()
    degrees = Degrees(pp=4, schedule=Schedule.ONE_F_ONE_B, num_micro_batches=8)
    each = [Proof(np.arange(1), np.full(1, float(n)), [], 1, np.zeros(0)) for n in range(EACH + 2)]
    for proof in each:
        proofs.add(degrees, 3, proof)
    assert list(proofs.of(degrees, 3)) == each[:1:-1]
    assert not list(proofs.of(degrees, 2))
    assert not list(proofs.of(Degrees(pp=4, schedule=Schedule.ZB_H1, num_micro_batches=8), 3))
