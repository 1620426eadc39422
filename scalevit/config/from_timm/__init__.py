"""From the command line of timm's train.py to a config: one table of its options, and the rules that use it.

`arguments` reads a command, `convert` makes the config, `page` the documentation. Must not import torch.
"""
