"""Training data: documents to a memory-mapped file of tokens, and the order in which it is read.

In go text files, JSON lines, Parquet or chat data; out come samples by (seed, global sample index). Open
`prepare.py` first.
"""
