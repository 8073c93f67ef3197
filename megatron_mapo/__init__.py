"""Reinforcement learning from verifiable rewards with Megatron-core, SGLang and MAPO."""

__version__ = "0.1.0"
