"""Package metadata of labelfree; the build system and the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="labelfree",
    version="0.1.0",
    description="4-bit weights and 8-bit activations for trained Caffe networks, from unlabeled images",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["quantize", "quantize.*"]),
    package_data={
        "quantize": ["py.typed"],
        "quantize.caffenet": ["*.proto", "*.desc", "*.pyi"],
        "quantize.report": ["*.j2", "*.js"],
    },
    install_requires=[
        "numpy>=1.26",
        "protobuf>=5.26",
        "onnx>=1.16",
        "onnxruntime>=1.18",
        "opencv-python-headless>=4.8",
        "lmdb>=1.4",
        "pydantic>=2.6",
        "PyYAML>=6.0",
        "click>=8.1",
        "rich>=13.7",
        "threadpoolctl>=3.5",
        "matplotlib>=3.8",
        "Jinja2>=3.1",
    ],
    extras_require={
        "hdf5": ["h5py>=3.8"],
        "dev": [
            "grpcio-tools",
            "h5py>=3.8",
            "hypothesis",
            "mypy",
            "pytest",
            "ruff",
            "types-protobuf",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["labelfree = quantize.cli:main"]},
)
