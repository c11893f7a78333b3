"""What quantising the KV costs in quality, measured in process through the real engine and store."""
