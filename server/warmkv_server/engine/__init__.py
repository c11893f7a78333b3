"""MLX only: model loading, the one MLX thread, batching, caches, sampling, text. Imports no gRPC and no SQL."""
