"""The engine behind its socket beside mlx-lm in a process of its own: `warmkv bench engine`."""
