"""A folder for timm, as its `push_to_hf_hub` writes one."""

import math
from pathlib import Path

from safetensors.torch import save_file

from dinocomp.interop.export.parts import Resampling, Subject, Written, refuse_identity, write_json
from dinocomp.interop.formats import ratio_of, to_timm

_SIZES = {384: "small", 768: "base", 1024: "large"}
_CODE = """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # timm 1.0.16 or newer
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.no_grad():
    tokens = model.forward_features(transform(Image.open("photo.jpg").convert("RGB"))[None])
cls, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens :]
"""
_MORE = """\
By hand, with any timm 1:

```python
import json

import timm

about = json.load(open("config.json"))
model = timm.create_model(
    about["architecture"], checkpoint_path="model.safetensors", num_classes=0, **about["model_args"]
).eval()
```
"""


def write_timm(subject: Subject, folder: Path) -> Written:
    """model.safetensors and config.json, which names one of timm's DINOv2 networks and what is different in this one.

    With registers timm keeps the class token's position in the token itself. Missing biases are zeros there.
    """
    refuse_identity(subject, "timm")
    about, registers = subject.architecture, subject.architecture["num_register_tokens"]
    tensors = to_timm(subject.net.state_dict())
    swiglu = about["ffn_layer"] != "mlp"
    size = "giant" if swiglu else _SIZES.get(about["embed_dim"], "small")  # giant has SwiGLU, which JSON cannot say
    arguments = {
        "img_size": about["img_size"],
        "patch_size": about["patch_size"],
        "in_chans": about["in_chans"],
        "embed_dim": about["embed_dim"],
        "depth": about["depth"],
        "num_heads": about["num_heads"],
        "mlp_ratio": ratio_of(len(tensors["blocks.0.mlp.fc1.weight"]), about["embed_dim"]),
        "qkv_bias": about["qkv_bias"],
        "init_values": about["init_values"] or 0.0,  # of LayerScale; timm takes None for its own default
        "reg_tokens": registers,
        "no_embed_class": registers > 0,
        "dynamic_img_size": True,
    }
    resize, crop = subject.view
    percentage = crop / resize
    if math.floor(crop / percentage) != resize:  # as timm computes it
        percentage = crop / (resize + 0.5)
    config = {
        "architecture": f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2",
        "num_classes": 0,
        "num_features": about["embed_dim"],
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [about["in_chans"], crop, crop],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": percentage,
            "crop_mode": "center",
            "mean": list(subject.mean),
            "std": list(subject.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    notes = ["timm has no mask token."]
    if registers:
        notes.append("The class token's position is in the class token.")
    if not (about["proj_bias"] and about["ffn_bias"]):
        notes.append("The network was trained without some biases; here they are there, and zero.")
    return Written("timm", "torch timm pillow", _CODE, _MORE, resampling=Resampling("timm", 0.0, True), notes=notes)
