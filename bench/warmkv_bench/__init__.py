"""WarmKV's benchmark: a client of the generated stubs, and of nothing else of the project."""
