"""The commands of `plan`: each reads its input, calls one function, and prints the answer.

A module imports click and errors at its top and everything else in the command's body, so that help is
quick. `planner.cli.COMMANDS` names each command, its module and its one-line help; `shared/options.py` is
where to start.
"""
