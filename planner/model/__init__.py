"""What is trained: the sizes of a model, its FLOPs, the activations it saves, and the workload.

In goes a Hugging Face `config.json`, a TOML file or a traced `nn.Module`; out comes a ModelSpec, a chain
of segments of equal layers with exact parameter counts. Nothing here knows devices or parallelism. Open
`spec.py` first.
"""
