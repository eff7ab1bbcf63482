"""Effective rank: recurrent states at chosen positions, their singular values, and the transitions of tokens."""
