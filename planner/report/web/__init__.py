"""The page of hardware choices as a local server, for this machine alone.

In go the fields of the page's form; out comes the page of `plan compare` for them. The server listens on
the loopback address and answers only GET. Open `app.py` first.
"""
