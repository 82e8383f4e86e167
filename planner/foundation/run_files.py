"""Names of the files in the folder of a training run, which the runtime writes and the planner reads.

plan.json                    the plan of the latest launch
options.json                 the options of that launch
checkpoints/                 committed steps (runtime.checkpoint.store)
metrics.jsonl                one line for every step, of all plans
summary.json, timeline.json  of the latest launch
earlier/step-00000120/       plan.json, summary.json and timeline.json of the plan that ran up to step 120
"""

from __future__ import annotations

CHECKPOINTS, LOCK = "checkpoints", ".lock"
PLAN, OPTIONS, METRICS, SUMMARY, TIMELINE = (
    "plan.json",
    "options.json",
    "metrics.jsonl",
    "summary.json",
    "timeline.json",
)


EARLIER = "earlier"
