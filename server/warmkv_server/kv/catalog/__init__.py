"""The durable record of the index: the database, the log of commits, manifests, and opening what a crash left."""
