"""The page of hardware choices as a local server: read-only, for this machine alone."""
