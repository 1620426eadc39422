"""scalevit: train parameter-reduced Vision Transformers.

Importing this package is cheap: nothing here imports torch. The rooms are
`scalevit.models`, `scalevit.data`, `scalevit.engines` and `scalevit.kernels`.
"""

__version__ = "0.1.0"
