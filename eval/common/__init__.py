"""What evals share: options, the texts they read, ranks, files of results, the look of pictures."""
