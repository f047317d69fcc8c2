"""Published names in a .pth file, with a hubconf.py that needs torch alone; and the same as safetensors."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dinocomp.interop.export.parts import Subject, Written, preprocessing, write_json

# (width, depth, heads) of the networks that the official hub makes, all with LayerScale and biases, FFN of 4 times D.
_OFFICIAL = {
    "vits14": (384, 12, 6, "mlp"),
    "vitb14": (768, 12, 12, "mlp"),
    "vitl14": (1024, 24, 16, "mlp"),
    "vitg14": (1536, 40, 24, "swiglu"),
}
_CODE = """\
import torch
from PIL import Image

model = torch.hub.load(".", "backbone", source="local")
transform = torch.hub.load(".", "transform", source="local")  # needs torchvision
with torch.no_grad():
    tokens = model.forward_features(transform(Image.open("photo.jpg"))[None])
cls, patches = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]
"""


def write_hub(subject: Subject, folder: Path) -> Written:
    """backbone.pth, config.json, preprocessing.json and hubconf.py."""
    torch.save({name: t.contiguous() for name, t in subject.net.state_dict().items()}, folder / "backbone.pth")
    write_json(folder / "config.json", subject.architecture)
    write_json(folder / "preprocessing.json", preprocessing(subject))
    shutil.copyfile(Path(__file__).with_name("hubconf.py"), folder / "hubconf.py")
    call = official_call(subject)
    if call is None:
        notes = ["No network of the official hub has this size; the `hubconf.py` here builds it."]
        return Written("dinov2", "torch torchvision pillow", _CODE, notes=notes)
    more = (
        f"The code of the official hub takes the weights, too (it is downloaded):\n\n```py\n{call}```\n\nWith its own "
        "values for `interpolate_...` it may give other tokens at other image sizes than that of training.\n"
    )
    return Written("dinov2", "torch torchvision pillow", _CODE, more)


def official_call(subject: Subject) -> str | None:
    """What makes this network with the official hub's code; None where it has none of this size."""
    about = subject.architecture
    size = tuple(about[name] for name in ("embed_dim", "depth", "num_heads", "ffn_layer"))
    name = next((name for name, official in _OFFICIAL.items() if official == size), None)
    biases = all(about[key] for key in ("qkv_bias", "proj_bias", "ffn_bias"))
    plain = biases and about["init_values"] and int(about["embed_dim"] * about["mlp_ratio"]) == 4 * about["embed_dim"]
    if name is None or not plain or about["num_register_tokens"] not in (0, 4):
        return None
    resampling = {key: about[key] for key in ("interpolate_offset", "interpolate_antialias")}
    entry, changes, later = f"dinov2_{name}", {key: about[key] for key in ("img_size", "patch_size")}, ""
    if about["num_register_tokens"]:  # its entry fixes how positions are resampled
        entry += "_reg"
        if resampling != {"interpolate_offset": 0.0, "interpolate_antialias": True}:
            later = "".join(f"model.{key} = {value!r}\n" for key, value in resampling.items())
    else:
        changes |= resampling
    arguments = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    return (
        f'model = torch.hub.load("facebookresearch/dinov2", "{entry}", pretrained=False, {arguments})\n{later}'
        'model.load_state_dict(torch.load("backbone.pth", weights_only=True))\n'
    )


def write_safetensors(subject: Subject, folder: Path) -> Written:
    """backbone.safetensors, whose metadata say how the network is built and its images are prepared."""
    about = {
        "format": "pt",
        "architecture": json.dumps(subject.architecture),
        **{name: json.dumps(list(getattr(subject, name))) for name in ("mean", "std", "view")},
    }
    tensors = {name: tensor.contiguous() for name, tensor in subject.net.state_dict().items()}
    save_file(tensors, folder / "backbone.safetensors", metadata=about)
    write_json(folder / "preprocessing.json", preprocessing(subject))
    code = 'from safetensors.torch import load_file\n\nweights = load_file("backbone.safetensors")\n'
    more = (
        'They are tensors by the names of the published models. `dinocomp.load("backbone.safetensors")` makes the '
        "network of them, which their metadata describe.\n"
    )
    return Written("safetensors", "torch safetensors", code, more)
