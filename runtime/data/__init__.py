"""Training data: files of documents to a memory-mapped file of tokens, and the order in which it is read."""
