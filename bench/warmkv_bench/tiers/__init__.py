"""What a request pays for its context not being in RAM: the same request hot, warm, and with the page cache dropped."""
