"""Adapters for Hugging Face transformers (the optional extra `hf`)."""
