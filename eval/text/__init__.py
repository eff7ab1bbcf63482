"""Text generation and scoring from cached states: decoding, sampling, and the model of lm-eval."""
