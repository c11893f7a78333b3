"""WarmKV for clients: the stubs of the contract (`v1`), and a thin client on them (`client`)."""

ROUTING_KEY = "warmkv-agent-id"
"""Metadata that names a request's agent, for routers, which can't read the request."""
