"""Starting runs: the quick start, and (with the shell scripts beside it) local and cluster launches."""
