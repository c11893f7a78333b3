"""Workloads beyond the matrix: many agents, conversations and traces, as a server meets them."""
