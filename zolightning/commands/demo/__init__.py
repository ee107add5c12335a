"""The demo: one pretrained language model, one task, and every way to fine-tune it side by side."""
