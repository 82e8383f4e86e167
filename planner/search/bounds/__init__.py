"""Lower bounds on the step time of a layout, with which the search rules layouts out.

In go a layout or its pipeline, and a step time to beat; out comes a time that no strategy beats, or how
many layers stages may still hold. Open `layout_bounds.py` first, then `relaxation.py`.
"""
