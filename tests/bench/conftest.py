"""The benchmarks run from the checkout and are never installed, so their tests need the checkout in sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
