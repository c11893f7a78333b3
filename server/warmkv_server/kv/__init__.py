"""The tiered KV store: every agent's context, hot in RAM and warm on disk.

`store.Store` is the whole of it to the rest of the server. docs/format.md describes the files.
"""
