"""Measure crossnet beside a direct connection and beside HAProxy, in the same run: `python -m bench`, see bench/README.md."""
