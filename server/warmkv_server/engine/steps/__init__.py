"""What is computed next, and computing it: the loop of the MLX thread."""
