"""An OpenAI-compatible server for bundles; needs the extra `serve`."""
