"""How keys and values are stored: one class a codec, and the plan that says which stream has which."""
