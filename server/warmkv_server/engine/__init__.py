"""MLX only: model loading, the one MLX thread, batching, caches, sampling, text. Imports no gRPC and no SQL."""

from warmkv_server.platform.descriptors import limits_unchanged

# Before any module of the engine can.
with limits_unchanged():
    import mlx_lm.utils  # noqa: F401
