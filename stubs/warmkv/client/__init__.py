"""A client of a WarmKV server on the generated stubs: connecting, retries that do nothing twice, answers, and errors.

    from warmkv.client import Client

    with Client("127.0.0.1:50051") as client:
        for text in client.stream("ada", "Hello! My name is Grace."):
            print(text, end="", flush=True)
        print(client.chat("ada", "What is my name?").text)

AsyncClient is the same for asyncio. Both leave the contract as it is: what they return are its messages (`warmkv.v1`).
"""

from warmkv.client.answer import Answer
from warmkv.client.asynchronous import AsyncClient, AsyncStream
from warmkv.client.channel import SERVICE_CONFIG
from warmkv.client.content import chat, text, tokens
from warmkv.client.errors import WarmKVError
from warmkv.client.synchronous import Client, Stream

__all__ = [
    "SERVICE_CONFIG",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Stream",
    "WarmKVError",
    "chat",
    "text",
    "tokens",
]
