"""One module per architecture, named after its Hugging Face `model_type`.

Each has `describe(fields) -> ModelConfig` and `NAMES`, the checkpoint's tensor names for each role of the decoder. What
all share is in `standard`; reading and checking config values in `fields`.
"""
