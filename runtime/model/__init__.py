"""The modules that are trained: a readable transformer built from a ModelSpec, whole or one stage of it.

In goes a ModelSpec; out come torch modules with attention, experts, losses, LoRA and fp8 products. Open
`transformer.py` first.
"""
