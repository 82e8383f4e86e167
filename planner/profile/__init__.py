"""What was measured on a device, and which measurement speaks for which device.

In go files that `plan profile` and `plan calibrate` wrote, or those that are shipped; out comes the
Profile whose samples and constants price a plan, and remarks on where it does not quite fit. Open
`profile.py` first.
"""
