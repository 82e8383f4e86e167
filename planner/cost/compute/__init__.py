"""Time of a layer's operators on one device: matrix products, attention, element-wise operators.

In go a layer class, its shard and the rates of a device; out come seconds forward and backward, from
measured operators where there are some and from first principles elsewhere. Open `analytic.py` first.
"""
