"""What speaks gRPC, and nothing else.

`endpoint.py` is the way of every call; `agent_servicer.py` and `server_servicer.py` are the two services; `validate.py`
and `convert.py` stand between messages and what `agents/` takes; `errors.py` maps every error to its status.
"""
