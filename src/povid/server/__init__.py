"""Any OpenAI-compatible server: endpoint and replies."""
