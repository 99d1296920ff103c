"""One module per architecture, named after its Hugging Face `model_type`.

Each has `describe(fields) -> ModelConfig`; `NAMES`, the checkpoint's tensor names for each role of the decoder; and
`DEFAULTS`, what transformers' config class takes where a config leaves a key out. What all share is in `standard`; reading
and checking config values in `fields`.
"""
