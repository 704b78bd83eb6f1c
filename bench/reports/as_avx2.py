"""Runs another report, or pytest, as if this processor had AVX2 alone: torch, its libraries and our kernels.

python -m bench.reports.as_avx2 bench.reports.profile_step --dtype float32
python -m bench.reports.as_avx2 pytest bench/ --benchmark-only

The faster library is found anew each time, and not remembered. Clock and caches are as they are, and so the figures are
those of a processor that there is not.
"""

import os
import runpy
import sys

LIMITS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.environ |= LIMITS  # read when torch is imported
    from uniad_fast.kernels.cpu import build

    if not build.PAYS:
        sys.exit("this processor has no AVX2")
    load = build._load
    build._load = lambda path, flags: load(path or "avx2", flags)  # type: ignore[assignment]
    build.remembered = lambda name, find: find()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
