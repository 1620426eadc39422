"""PyTorch FSDP2: settings, engine and cost."""
