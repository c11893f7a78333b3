"""WarmKV for clients: the stubs of the contract (`v1`), and a thin client on them (`client`)."""
