"""The report of a plan or a run: one offline HTML page, and a Perfetto trace of the same step."""
