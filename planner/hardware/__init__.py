"""Devices, links, clusters, this machine, cloud instances and their prices.

In goes the text of `--cluster`, a TOML file or a name of the catalog; out comes a ClusterSpec with device
groups, link speeds and dollars an hour. The facts lie in `profiles/` with their sources. Open
`cluster.py` first.
"""
