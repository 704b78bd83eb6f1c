"""What is fast: the ops, their definition, and which implementation serves a call."""
