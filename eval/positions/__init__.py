"""Length extrapolation: the loss at every position of long texts, kept in parts, put into buckets, shown."""
