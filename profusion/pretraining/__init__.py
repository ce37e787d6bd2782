"""PromptNet's pre-training at size (ProFusion, arXiv 2305.13579, section 3.1): one process or many, one command."""
