"""The WarmKV server: a gRPC service over MLX that never computes the same context twice."""

import os

from warmkv_server.platform import blas

# Before any module of the package can import MLX: see blas.py.
blas.preload()

# On CUDA, MLX raises an error once it has made twice as many graphs, or plans for attention, as it keeps, however
# seldom: every long-lived server gets there. Old ones are dropped either way.
os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")
