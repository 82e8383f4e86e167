"""What really ran: settings read back from running modules, messages counted, memory measured.

In goes a running model; out come the settings that it executes, to be compared with its plan. Open
`executed_settings.py` first.
"""
