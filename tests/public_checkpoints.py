"""Checkpoints as the public code writes them: its network on its backbone."""

import torch

from uniad_fast.testing import PublicUniAD

SIDE, GRID = 96, (6, 6)


def network(**options):
    """The public network, the same in every test."""
    torch.manual_seed(2)
    return PublicUniAD(272, 16, GRID, (3, 3), hidden_dim=32, layers=2, dim_feedforward=48, **options).eval()


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def public_state(backbone_tensors):
    return under("module.backbone.", backbone_tensors) | under("module.reconstruction.", network().state_dict())
