"""Packaging of Marionette. Ranges live here; the exact set the tests ran with is in constraints.txt."""

from pathlib import Path

from setuptools import setup

PACKAGES = [
    "models",
    "models.diffusion",
    "models.motion",
    "models.vae",
    "models.wan",
    "data",
    "stream",
    "stream.dragstream",
    "eval",
    "eval.benchmarks",
    "eval.metrics",
    "train",
    "distill",
]

REQUIRES = [
    "torch>=2.7",
    "accelerate>=1.10.1",
    "hydra-core>=1.3.2",
    "omegaconf>=2.3",
    "numpy>=1.26",
    "einops>=0.8",
    "safetensors>=0.5",
    "diffusers>=0.35",
    "transformers>=4.56",
    "sentencepiece>=0.2",
    "ftfy>=6.2",
    "decord>=0.6",
    "av>=14.1",
    "opencv-python-headless>=4.9",
    "webdataset>=1.0",
    "pillow>=10",
    "matplotlib>=3.8",
    "tqdm>=4.66",
    "wandb>=0.19",
    "torchmetrics>=1.6",
    "psutil>=5.9",
]

EXTRAS = {
    "deepspeed": ["deepspeed>=0.16"],
    "dev": [
        "pytest>=8",
        "scipy>=1.11",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.14",
        "import-linter>=2.1",
    ],
}

setup(
    name="marionette",
    version="0.1.0",
    description="Trains, distils and streams motion-controlled video models.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
