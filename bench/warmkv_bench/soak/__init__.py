"""Thousands of requests of many agents at once, with everything that can go wrong on the client's side."""
