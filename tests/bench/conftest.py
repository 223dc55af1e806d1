"""The benchmarks are run from the checkout and never installed: only here do tests look for them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
