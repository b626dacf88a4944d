"""Who is near whom in one training: recommended items, nearest items, similar users."""
