"""Token shards: what is on disk (`manifest`, `shards`, `verified`), in which order it is read (`order`), and the two
kinds of data that train on text, `prepared` and `streaming`.
"""
