"""vllm.grpc.engine.VllmEngine: what Shepherd Model Gateway asks its workers, answered by the same agents.

Nothing here is imported unless the operator wants it: the contract's messages are of a package that need not be there.
`servicer.py` has the RPCs, `asked.py` and `answered.py` stand between its messages and ours, and `kv_events.py` says
which prefixes are held.
"""
