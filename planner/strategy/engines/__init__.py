"""What each training engine can run: DeepSpeed, Megatron-LM, torchtitan and this project's own runtime.

In go a model and a strategy; out come the rules of that engine which they break, each with its reason and
its source in the engine's code. Open `engine_rules.py` first.
"""
