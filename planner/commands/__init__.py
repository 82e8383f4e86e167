"""The bodies of the commands, one module for a command or a small family.

A module here imports click and plain standard modules at its top; everything heavier is imported inside
the command's body. `planner.cli.COMMANDS` names each command, its module and its one-line help.
"""
