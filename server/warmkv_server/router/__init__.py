"""The configuration of Envoy, which leads every agent to its server."""
