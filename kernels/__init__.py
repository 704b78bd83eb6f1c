"""Compiled kernels. Nothing here imports uniad_fast, and `import uniad_fast` does not import this."""
