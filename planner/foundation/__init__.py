"""Units, errors, and strict reading and writing of files: what every other room stands on.

In go texts such as `72GiB` or `30d` and files of JSON and TOML; out come SI numbers, frozen dataclasses,
or an InputError that lists every fault with its path and the nearest legal value. Open `units.py` first.
"""
