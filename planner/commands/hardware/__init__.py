"""Commands that ask which hardware: size, compare, napkin, scaling, list, show, web.

Each reads its options, calls `planner.sizing` or the catalog, and prints a table, JSON or a page. Open
`size.py` first.
"""
