"""From content to tokens, in processes of their own that can be stopped. Imports no MLX."""
