"""One file for each axis of parallelism: the `apply_*` verbs that `runtime.parallelize` puts in order."""
