"""What happens to contexts: load, commit, change, evict, collect, and what upkeep does by itself."""
