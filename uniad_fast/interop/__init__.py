"""Other people's code: our attention in their models, their checkpoints in ours."""
