"""The search within one training: nearest items, recommended items, similar users."""
