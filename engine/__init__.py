"""One shard running plans: sites, packed attention, key/value store, fragments."""
