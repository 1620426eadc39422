"""The README of a model: what it is, how it is loaded, what it expects. Knows no files."""

import json

from scalevit.export.base import ModelDescription
from scalevit.export.timm_model import TimmModel, create_call

_PAPER = "arXiv:2512.01059"


def model_card(description: ModelDescription, call: TimmModel, *, parameters: int) -> str:
    """The text, with the header that model hubs read.

    Args:
        parameters: unique ones; a shared MLP counts once.
    """
    model, reduction, images = description.model, description.reduction, description.preprocessing
    reduced = f", reduced by {reduction.strategy} MLPs ({_PAPER})" if reduction.changes_model else ""
    settings = json.dumps(reduction.model_dump(mode="json"))
    classes = ""
    if description.label_names is not None:
        listed = ", ".join(description.label_names[:20])
        more = len(description.label_names) - 20
        classes = f"\nClasses: {listed}{f' and {more} more (label_names in config.json)' if more > 0 else ''}.\n"
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
---

# {model.name}{reduced}

A Vision Transformer for images of {images.image_size} x {images.image_size} pixels and {model.num_classes} classes,
with {parameters:,} parameters, trained and exported with scalevit. Reduction: `{settings}`.
{classes}
## Use

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()   # or "hf-hub:NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
probabilities = model(transform(image).unsqueeze(0)).softmax(1)         # image: a Pillow image in RGB
```

It is plain timm's model; model.safetensors holds a copy of each shared tensor for every block that uses it:

```python
{create_call(call.architecture, {**call.arguments, "checkpoint_path": "model.safetensors"})}
```

Images are resized so that a central crop of {images.crop_pct:g} of the side gives the input ({images.interpolation}),
and normalised with mean {_numbers(images.mean)} and standard deviation {_numbers(images.std)}.
"""


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
