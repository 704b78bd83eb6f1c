"""The doctor's verdict: right of sound kernels, and of each that is broken on purpose."""

import pytest
import torch
from op_cases import device_of
from uniad_fast.kernels.cpu import launch as cpu

from uniad_fast.cli import doctor
from uniad_fast.cli.main import app
from uniad_fast.ops import reference
from uniad_fast.ops.dispatch import IMPLS


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_here_is_sound(impl):
    assert doctor.problem_with(impl, device_of(impl)) is None


def broken(function, change):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        return change(result) if isinstance(result, torch.Tensor) else (change(result[0]), *result[1:])

    return call


def last(function, change):
    def call(*args, **kwargs):
        *rest, end = function(*args, **kwargs)
        return *rest, change(end)

    return call


@pytest.mark.parametrize(
    "change", [lambda t: t + 1e-2, lambda t: t * float("nan"), torch.zeros_like], ids=["off", "NaN", "zero"]
)
@pytest.mark.parametrize(
    ("launcher", "named"),
    [
        ("attention_forward", "attention is off"),
        ("attention_backward", "attention is off"),
        ("jitter_forward", "jitter_project is off"),
        ("jitter_backward", "jitter_project is off"),
        ("norm_forward", "dropout_add_norm is off"),
        ("norm_backward", "dropout_add_norm is off"),
        ("dropout_forward", "dropout is off"),
        ("dropout_backward", "dropout is off"),
    ],
)
def test_a_broken_kernel_is_found_and_named(launcher, named, change, monkeypatch):
    monkeypatch.setattr(cpu, launcher, broken(getattr(cpu, launcher), change))
    found = doctor.problem_with("cpu", torch.device("cpu"))
    assert found is not None and found.startswith("is WRONG") and named in found


@pytest.mark.parametrize("launcher", ["attention_backward", "jitter_backward", "norm_backward"])
def test_the_last_gradient_is_looked_at_too(launcher, monkeypatch):
    monkeypatch.setattr(cpu, launcher, last(getattr(cpu, launcher), lambda t: t + 1e-2))
    assert doctor.problem_with("cpu", torch.device("cpu")) is not None


def test_noise_is_on(monkeypatch):
    """A kernel that draws nothing, or another seed's noise, is wrong."""
    for name, change in (
        ("attention_forward", lambda args: (*args[:3], torch.tensor(6), *args[4:])),
        ("jitter_forward", lambda args: (*args[:3], torch.tensor(6), *args[4:])),
        ("norm_forward", lambda args: (*args[:4], torch.tensor(6), *args[5:])),
        ("dropout_forward", lambda args: (args[0], torch.tensor(6), *args[2:])),
    ):
        with monkeypatch.context() as patch:
            function = getattr(cpu, name)
            patch.setattr(cpu, name, lambda *args, f=function, c=change: f(*c(args)))
            assert doctor.problem_with("cpu", torch.device("cpu")) is not None, name


def test_what_fails_is_said_and_the_exit_code_tells(monkeypatch):
    from typer.testing import CliRunner

    def fail(*_args):
        raise OSError("no such instruction")

    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setattr(cpu, "norm_backward", fail)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert "impl cpu: is WRONG: dropout_add_norm fails (OSError: no such instruction)" in result.output


def test_a_broken_definition_is_no_excuse(monkeypatch):
    """It is the other implementations' measure: all of them then disagree with it."""
    dropped = reference.dropout
    monkeypatch.setattr(reference, "dropout", lambda *args: dropped(*args) * 1.1)
    assert doctor.problem_with("cpu", torch.device("cpu")) is not None
