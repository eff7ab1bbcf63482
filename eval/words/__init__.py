"""State tracking: words of a group or a formal language, counted right, told and shown; what the heads do."""
