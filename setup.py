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
    author="the labelfree authors",
    keywords="caffe quantization compression calibration neural-network",
    project_urls={
        "Paper": "https://openaccess.thecvf.com/content_ECCV_2018/html/"
        "Xiangyu_He_Learning_Compression_from_ECCV_2018_paper.html",
        "Authors' code": "https://github.com/HolmesShuan/Label-free-Network-Compression",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["quantize", "quantize.*"]),
    package_data={
        "quantize": ["py.typed", "caffe_layers/*.?pp", "caffe_layers/*.cu", "caffe_layers/Makefile"],
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
        "mnn": ["MNN>=3.4"],
        "ncnn": ["ncnn>=1.0.20240820"],
        "openvino": ["openvino>=2024.4"],
        "dev": [
            "grpcio-tools",
            "h5py>=3.8",
            "hypothesis",
            "MNN>=3.4",
            "mypy",
            "ncnn>=1.0.20240820",
            "openvino>=2024.4",
            "pytest",
            "ruff",
            "setuptools>=70.1",
            "types-protobuf",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["labelfree = quantize.cli:main"]},
)
