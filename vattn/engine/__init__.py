"""Continuous batching: requests, scheduler, sampler and runner for unmodified Hugging Face models."""
