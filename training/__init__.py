"""What made the built-in model: a package of the checkout alone, run from its root with `python -m training`."""

from pathlib import Path

# Comes before anything that imports MLX, so that MLX computes with the BLAS that the server gives it.
from warmkv_server.models import tiny

MODEL = Path(tiny.__file__).parent
"""The folder that the server loads, where the trained model goes."""
