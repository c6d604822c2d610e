"""The samplers of the student's responses, and the sync of its weights."""
