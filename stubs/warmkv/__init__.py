"""WarmKV's client stubs."""
