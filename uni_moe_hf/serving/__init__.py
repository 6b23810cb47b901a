"""
Where others ask the model: the plug-in by which vLLM serves our checkpoints, and a page in the browser.
May import `hub`, `mixtures`, `evaluation` and `insight`.
"""
