"""`make bench`: search speed, then predicted against measured on this machine, into bench/results/."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from bench import cli_speed, local_plans, model_counts, overhead, replay_speed, search_speed

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs every benchmark that needs nothing but this machine."""
    today = datetime.now(UTC).date().isoformat()
    model_counts.main(["--out", str(RESULTS / f"{today}-model-counts.csv")], standalone_mode=False)
    cli_speed.main(["--out", str(RESULTS / f"{today}-cli-speed.json")], standalone_mode=False)
    replay_speed.main(["--out", str(RESULTS / f"{today}-replay-speed.json")], standalone_mode=False)
    search_speed.main(["--out", str(RESULTS / f"{today}-search-speed.json")], standalone_mode=False)
    overhead.main(["--out", str(RESULTS / f"{today}-overhead.json")], standalone_mode=False)
    local_plans.main(["--out", str(RESULTS / f"{today}-local-plans.json")], standalone_mode=False)


if __name__ == "__main__":
    main()
