"""Pre-training of a PromptNet at size: pictures from anywhere, on one process or many."""
