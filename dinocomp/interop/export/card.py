"""README.md of an export: a model card, filled from what is known of the run."""

import yaml

from dinocomp.interop.export.differences import Difference, in_words
from dinocomp.interop.export.facts import Facts, architecture_in_words
from dinocomp.interop.export.parts import Subject, Written

_UNKNOWN = "not known"
_CARD = """\
---
license: # FILL IN before publishing, e.g. apache-2.0 or cc-by-nc-4.0
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [dinov2, self-supervised]
---

# {title}

Frozen image features: a class token for the image, and a token for each patch. A DINOv2 backbone
([paper](https://arxiv.org/abs/2304.07193)), trained without labels; files written by dinocomp {version}.

> **Licence: not stated.** It depends on the images and weights that this model was trained from. Fill it in here and in
> the first lines of this file before you publish it.

## Use

In this folder (or with its path for `.`), after `pip install {needs}`:

```python
{code}```
{more}
Images: RGB, shorter side to {resize} pixels (bicubic, antialiased), middle {crop} x {crop}, then
(pixels / 255 - mean) / std with mean {mean} and std {std} by channel.

## What it is

| | |
|---|---|
{rows}

{differs}

{config}"""


def write_card(subject: Subject, written: Written, facts: Facts, found: list[Difference], version: str) -> str:
    """The text of the card.

    Args:
        found: differences at other sizes, where `written` tells how positions are resampled.
        version: of dinocomp.
    """
    differs = [in_words(written.resampling, found)] if written.resampling else []
    return _CARD.format(
        library=written.library,
        title=facts.source,
        version=version,
        needs=written.needs,
        code=written.code,
        more=f"\n{written.more}" if written.more else "",
        resize=subject.view[0],
        crop=subject.view[1],
        mean=_numbers(subject.mean),
        std=_numbers(subject.std),
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(subject, facts)),
        differs="\n".join(f"- {note}" for note in [*differs, *written.notes]),
        config=f"<details><summary>Configuration of the run</summary>\n\n```yaml\n{_public(facts.config)}\n```\n\n"
        "</details>\n"
        if facts.config.strip()
        else "",
    )


def _rows(subject: Subject, facts: Facts) -> list[tuple[str, str]]:
    steps = _UNKNOWN
    if facts.iteration is not None:
        steps = f"{facts.iteration:,}" + (f" of {facts.steps:,}" if facts.steps else "")
        if facts.images_per_step:
            steps += f", of {facts.images_per_step:,} images each"
    data = "/".join(facts.data.rstrip("/").split("/")[-2:]) or _UNKNOWN  # not where it lies
    if facts.images is not None:
        data += f" ({facts.images:,} images)"
    knn = "not measured while training"
    if facts.knn:
        knn = ", ".join(f"{100 * value:.1f} % (k = {k})" for k, value in facts.knn.items())
        if None not in facts.evaluated:
            knn += "; {:,} images searched, {:,} scored".format(*facts.evaluated)
        if facts.knn_iteration != facts.iteration:
            knn += f"; measured after {facts.knn_iteration:,} steps"
    parameters = sum(tensor.numel() for tensor in subject.net.parameters())
    return [
        ("network", architecture_in_words(subject.architecture, parameters)),
        ("training images", data),
        ("training steps", steps),
        ("k-NN accuracy of its class tokens", knn),
    ]


def _public(config: str) -> str:
    """A configuration without where it was run and logged, which is nobody's business."""
    settings = yaml.safe_load(config) or {}
    for name in ("loggers", "data", "checkpoint", "MODEL"):
        settings.pop(name, None)
    train = settings.get("train", {})
    for name in ("output_dir", "dataset_path"):
        train.pop(name, None)
    for section, name in (("evaluation", "train_dataset_path"), ("evaluation", "val_dataset_path")):
        settings.get(section, {}).pop(name, None)
    for section, name in (("student", "pretrained_weights"), ("teacher", "distil_from")):
        settings.get(section, {}).pop(name, None)
    return yaml.safe_dump(settings, sort_keys=False).strip()


def _numbers(values) -> str:
    return ", ".join(f"{value:g}" for value in values)
