"""What quantising the KV costs in quality, and the store in bytes and time: in process, the real engine and store."""
