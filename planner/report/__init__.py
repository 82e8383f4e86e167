"""Pages and charts: a plan or a run, a profile, and choices of hardware, each one offline HTML file.

In go a Plan, a run's folder, a Profile or a Comparison; out comes one HTML document that needs no
network, or a Perfetto trace. Open `page.py` first.
"""
