"""Sequences made from a seed alone: words over a group (`group_words`) and formal languages (`languages`)."""
