"""README.md of an export: the model card, from what the run has written."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn

from irpe_ds.checkpoint.manifest import CheckpointManifest
from irpe_ds.config import RunConfig
from irpe_ds.environment import Environment
from irpe_ds.errors import printable

SECTIONS = ("model", "data", "augment", "optim", "train", "distill")
"""What a recipe has of a run's configuration."""
SHOWN = 20  # names of classes
PAGE = """\
---
{head}---
# {name}

{what}

## Use

With iRPE-DS installed, which has the attention; FOLDER is where this file is.

```python
import irpe_ds

model, transform, classes = irpe_ds.load("FOLDER")
scores = model(transform(image)[None]).softmax(-1)  # image: of Pillow
```

After `import irpe_ds`, `timm.create_model("local-dir:FOLDER", pretrained=True)` makes the model
too, and on the hub `"hf-hub:OWNER/NAME"`.

## Scores

{scores}

## Data

{data}

## Recipe

```yaml
{recipe}```

## Made with

{made}
"""


def model_card(
    config: RunConfig,
    model: nn.Module,
    manifest: CheckpointManifest,
    environment: Environment,
    classes: tuple[str, ...] | None,
    *,
    average: bool,
    license: str | None,
) -> str:
    """The card's text, in Markdown.

    Args:
        model: the run's, on any device.
        average: whether the weights are the moving average.
        license: of the weights; None: the card does not say.
    """
    head: dict[str, Any] = {"library_name": "timm", "pipeline_tag": "image-classification"}
    head["tags"] = ["image-classification", "timm", "irpe"]
    if license is not None:
        head["license"] = license
    rpe, rows = config.model.rpe, config.model.img_size
    encoded = f" with {rpe.mode} {rpe.method} relative position (iRPE) on {rpe.on}" if rpe else ""
    count = sum(parameter.numel() for parameter in model.parameters())
    return printable(
        PAGE.format(
            head=_yaml(head),
            name=config.name,
            what=(
                f"`{config.model.name}`{encoded}: {count / 1e6:.2f} M parameters, images of "
                f"{rows[0]} x {rows[1]} pixels, {config.model.num_classes} classes."
            ),
            scores=_scores(manifest, average),
            data=_data(config, manifest, classes),
            recipe=_yaml(_recipe(config)),
            made=_made(manifest, environment),
        )
    )


def _scores(manifest: CheckpointManifest, average: bool) -> str:
    kind, found = "ema_" if average else "", manifest.scores
    whose = "the moving average of the weights" if average else "the weights"
    when = f"{whose} after {manifest.update:,} updates, {manifest.epoch} epochs"
    if f"{kind}top1" not in found:
        return f"Not evaluated: {when}."
    images = f"{found['images']:,.0f} images" if "images" in found else "the images"
    forms = {  # of a manifest's scores
        "top1": ("top-1", "{:.2f} %"),
        "top5": ("top-5", "{:.2f} %"),
        "loss": ("loss", "{:.4f}"),
    }
    known = {
        title: form.format(found[kind + key])
        for key, (title, form) in forms.items()
        if kind + key in found
    }
    rows = (known, ["---"] * len(known), known.values())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Of {images} of validation, {when}:\n\n{table}"


def _data(config: RunConfig, manifest: CheckpointManifest, classes: tuple[str, ...] | None) -> str:
    val = config.data.val
    held_out = f"{config.data.val_share:.0%} of it" if val is None else f"`{val.name}`"
    parts = f"`{config.data.train.name}` to train, {held_out} to validate"
    text = f"{manifest.num_samples:,} images of {parts}."
    if classes is None:
        return text
    more = f"\n# and {len(classes) - SHOWN} more, in config.json" if len(classes) > SHOWN else ""
    return f"{text} Classes:\n\n```yaml\n{_yaml([*classes[:SHOWN]]).rstrip()}{more}\n```"


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The configuration without what is of one machine: folders, workers, logs."""
    values = config.model_dump(mode="json")
    for section in SECTIONS:
        paths = {
            key: value.name for key, value in getattr(config, section) if isinstance(value, Path)
        }
        values[section].update(paths)
    values["data"].pop("workers")
    return {section: values[section] for section in SECTIONS}


def _made(manifest: CheckpointManifest, environment: Environment) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in environment.packages.items() if text)
    rows = {
        "commit": environment.commit,
        "packages": versions,
        "hardware": f"{manifest.world_size} x {environment.device}",
    }
    return "\n".join(f"- {key}: {value}" for key, value in rows.items() if value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
