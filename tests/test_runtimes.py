"""The engines' own runtimes."""

import subprocess
import sys

import pytest

FREED_ELSEWHERE = """
import os, signal, sys, threading
import numpy as np, openvino
from openvino import opset13 as ops
from uniad_fast.deploy.runtimes import openvino_request

signal.signal(signal.SIGTERM, lambda *_: print("noted", flush=True))
x = ops.parameter([1, 64], np.float32)
model = openvino.Model([ops.matmul(x, ops.constant(np.ones((64, 64), np.float32)), False, False)], [x])
held = [openvino_request(model, None)]
held[0].infer({0: np.ones((1, 64), np.float32)})
thread = threading.Thread(target=held.clear)
thread.start(), thread.join()
os.kill(os.getpid(), signal.SIGTERM)
print("alive", flush=True)
"""


def test_a_signal_finds_its_stack_after_another_thread_has_freed_a_model():
    """As it is when a service loads its detector again."""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", FREED_ELSEWHERE], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["noted", "alive"], (done.returncode, done.stderr[-500:])
