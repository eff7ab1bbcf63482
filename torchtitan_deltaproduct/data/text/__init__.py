"""From text to tokens: `sources` and `records` read it, `tokenizer` encodes it, `prepare` writes shards of it."""
