"""Time of one layer on one device: matrix products, attention, element-wise operators, recomputation.

In go a layer class, its shard and a profile; out come seconds forward and backward, from measured samples
where there are some and from first principles elsewhere. Open `layer_cost.py` first.
"""
