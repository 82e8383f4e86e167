"""Shardwise's planner: which hardware, how to split the model, will it fit, how long, how many dollars.

Every room below answers one question and imports only rooms before it in this order: foundation, model,
hardware, profile, job, strategy, cost, calibration, search, advice, sizing, export, report, commands. No
module here imports torch; `planner.cli` is the entry point of the command `plan`.
"""
