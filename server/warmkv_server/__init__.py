"""The WarmKV server: a gRPC service over MLX that never computes the same context twice."""

from warmkv_server import blas

# Before any module of the package can import MLX: see blas.py.
blas.preload()
