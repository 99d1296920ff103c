"""Anatomies of models from their Hugging Face configs or GGUF headers, also of those that EdgeKit does not convert yet."""
