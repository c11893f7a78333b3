"""Finding, loading and describing a model, and what it needs on this device."""
