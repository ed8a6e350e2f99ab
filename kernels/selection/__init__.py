"""From queries and keys to the tiles worth attending to: pooling, choosing, lists."""
