"""The caches that a model attends to: kinds of layers, codecs, and the way to stacked tensors and back."""
