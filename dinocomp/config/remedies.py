"""What to type instead of a key that there is not, or of a value that does not fit."""

import re
from collections.abc import Collection
from typing import Any

from dinocomp.config.keys import Key, item_type, range_text
from dinocomp.hints import nearest

# What other programs call it; alone, or as the last part of a key.
_ALSO_CALLED = {
    "learning_rate": "optim.base_lr",
    "blr": "optim.base_lr",
    "batch_size": "train.batch_size_per_gpu",
    "batchsize": "train.batch_size_per_gpu",
    "bs": "train.batch_size_per_gpu",
    "workers": "train.num_workers",
    "dataset": "train.dataset_path",
    "data_path": "train.dataset_path",
    "output": "train.output_dir",
    "out_dir": "train.output_dir",
    "model": "student.arch",
    "weights": "MODEL.WEIGHTS",
    "n_prototypes": "dino.head_n_prototypes",
    "max_steps": "optim.epochs",
    "iterations": "optim.epochs",
}

_YES, _NO = {"1", "true", "yes", "y", "on"}, {"0", "false", "no", "n", "off"}
_SAME_CHOICE = {"cuda": "gpu", "float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


def likely_keys(name: str, known: Collection[str]) -> list[str]:
    """The keys that somebody may have meant by `name`, the likeliest first."""
    called = _ALSO_CALLED.get(name.rpartition(".")[2].lower().replace("-", "_"))
    return [called] if called else nearest(name.replace("-", "_"), known)


def suggest_key(name: str, known: Collection[str]) -> str:
    """A sentence on what to type instead of a key that there is not."""
    if name.lstrip("+~") in known:
        return f" Write {name.lstrip('+~')}."
    likely = likely_keys(name, known)
    return f" Did you mean {' or '.join(likely)}?" if likely else " `dinocomp plan YAML --full` lists every key."


def unresolved(reason: str) -> str:
    """OmegaConf's reason for a value it could not resolve, and what to do about it."""
    reason = reason.splitlines()[0]
    if "Environment variable" in reason:
        return f"{reason.partition(': ')[2]}; set it, or write ${{oc.env:NAME,VALUE}}, whose VALUE is taken without it"
    if "Recursive" in reason:
        return "it refers back to itself; give one of these keys a value"
    if "Missing mandatory" in reason:
        return "??? stands for a value still to come; give it one"
    return f"{reason}; ${{...}} takes the name of a key, such as ${{train.output_dir}}"


def type_hint(raw: Any, spec: Key) -> str:
    """What commonly went wrong for a value of the wrong type."""
    wanted, is_list = item_type(spec.annotation)
    if isinstance(raw, str) and is_list:
        items = [item for item in re.split(r"[,;\s]+", raw.strip("()[] ")) if item]
        return f"; write [{','.join(items)}]" if items else ""
    if is_list and isinstance(raw, int | float) and not isinstance(raw, bool):
        return f", such as [{','.join(f'{item:g}' for item in spec.default)}]"
    if wanted is bool and str(raw).lower() in _YES | _NO:
        word = "true" if str(raw).lower() in _YES else "false"
        return f"; write {word} (without quotes)" if isinstance(raw, str) else f"; write {word}"
    if isinstance(raw, str) and wanted in (int, float):
        number = raw.strip().replace(",", ".")
        try:
            float(number)
        except ValueError:
            return ""
        return f"; write {number} (without quotes)" if number == raw else f"; write {number}"
    if isinstance(raw, float) and raw.is_integer() and wanted is int:
        return f"; write {int(raw)}"
    if raw is None:
        return "; null is not a value here" + (", '' is the empty one" if wanted is str else "; give one")
    if wanted is str and spec.choices:
        return f", {range_text(spec)}"
    if wanted is str:
        return f" (in quotes): {spec.meaning}"
    return ""


def choice_hint(raw: Any, spec: Key) -> str:
    """The choice that was likely meant."""
    if not isinstance(raw, str) or not spec.choices:
        return ""
    same = _SAME_CHOICE.get(raw.lower().partition(":")[0])
    names = [same] if same in spec.choices else nearest(raw, spec.choices, 1)
    return f". Did you mean {names[0]}?" if names else ""
