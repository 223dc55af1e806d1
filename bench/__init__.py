"""Measure crossnet against a direct connection and against HAProxy, in the same run: `python -m bench`, see bench/README.md."""
