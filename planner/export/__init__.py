"""Plans as configurations of other engines and schedulers, and strategies read back from such files.

Nothing here imports an engine: files are text. What an engine cannot express is told by name, never dropped.
"""
