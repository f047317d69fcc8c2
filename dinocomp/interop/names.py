"""Names of weights: the published ones, and what other writers call the same tensors."""

import re


def published_name(name: str) -> str:
    """A backbone weight's name as in the published checkpoints.

    The reference wraps blocks in chunks while it trains (``blocks.{chunk}.{i}.``) and prefixes the backbone
    (``backbone.``); wrappers add ``module.`` or ``_orig_mod.``. All of that goes.
    """
    name = re.sub(r"\b(module|_orig_mod|_fsdp_wrapped_module)\.", "", name)
    name = name.removeprefix("backbone.")
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
