"""Bytes: the files of blocks, how they are written, read, checked and put away."""
