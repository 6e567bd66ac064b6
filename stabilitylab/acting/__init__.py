"""Acting: what steps into an edit instead of looking at it from outside. It names operations and makes edits again."""
