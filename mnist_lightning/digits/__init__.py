"""Where digits come from, and how they look."""
