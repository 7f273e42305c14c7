"""Text run through a loaded engine: profiles, evaluation, scores."""
