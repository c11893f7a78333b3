"""What can be done with agents: the use cases between the service, the engine and the store.

A file is one idea. `agents.py` is the door; behind it `turns.py` puts the requests of one agent in order, `run.py`
keeps a request at work when its caller goes away, `requests.py` makes retries safe, `context.py` turns content into
tokens, `compute.py` is the way through store and engine, and `prime.py`, `generate.py` and `manage.py` are the use
cases.
"""
