"""Aquila-SFT: rebuild, adapt, evaluate and talk to small bilingual language models."""

__version__ = "0.1.0"
