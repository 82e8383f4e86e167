"""Plans as configurations of other engines and launchers, and strategies read back from such files.

In goes a Plan; out come files for DeepSpeed, Megatron-LM, torchtitan, Accelerate, Slurm, Kubernetes or
SkyPilot. Nothing here imports an engine: files are text, and what an engine cannot express is refused by
name. Open `targets.py` first.
"""
