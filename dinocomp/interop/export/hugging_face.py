"""A folder for transformers: Dinov2Model, or Dinov2WithRegistersModel."""

from pathlib import Path

from safetensors.torch import save_file

from dinocomp.interop.export.parts import Resampling, Subject, Written, refuse_identity, write_json
from dinocomp.interop.formats import to_hugging_face

_CODE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModel.from_pretrained(".").eval()
inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    tokens = model(**inputs).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {first}:]
"""


def write_hugging_face(subject: Subject, folder: Path) -> Written:
    """model.safetensors, config.json and preprocessor_config.json.

    The model with registers filters positions where it resamples them to a smaller grid, that without does not. Which
    one is written follows the network; the first does well with no register, too.
    """
    refuse_identity(subject, "transformers")
    about = subject.architecture
    registers = about["num_register_tokens"]
    filtered = registers > 0 or about["interpolate_antialias"]
    kind, name = ("dinov2_with_registers", "WithRegisters") if filtered else ("dinov2", "")
    config = {
        "architectures": [f"Dinov2{name}Model"],
        "model_type": kind,
        "hidden_size": about["embed_dim"],
        "num_hidden_layers": about["depth"],
        "num_attention_heads": about["num_heads"],
        "mlp_ratio": int(about["mlp_ratio"]) if about["mlp_ratio"] % 1 == 0 else about["mlp_ratio"],
        "hidden_act": "gelu",
        "use_swiglu_ffn": about["ffn_layer"] != "mlp",
        "qkv_bias": about["qkv_bias"],
        "layerscale_value": about["init_values"] or 1.0,
        "layer_norm_eps": 1e-6,
        "image_size": about["img_size"],
        "patch_size": about["patch_size"],
        "num_channels": about["in_chans"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }
    if filtered:
        config["num_register_tokens"] = registers
    write_json(folder / "config.json", config)
    tensors = to_hugging_face(subject.net.state_dict())
    if filtered and not registers:
        tensors["embeddings.register_tokens"] = tensors["embeddings.cls_token"][:, :0]  # [1, 0, D]
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    resize, crop = subject.view
    preparation = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(subject.mean),
        "image_std": list(subject.std),
    }
    write_json(folder / "preprocessor_config.json", preparation)
    notes = []
    if not about["init_values"]:
        notes.append("The network was trained without LayerScale; here it is there, and all ones.")
    if not (about["proj_bias"] and about["ffn_bias"]):
        notes.append("The network was trained without some biases; here they are there, and zero.")
    if filtered and not registers:
        notes.append("It is a model with registers, but with none of them: that one resamples positions as here.")
    return Written(
        "transformers",
        "torch transformers pillow",
        _CODE.format(first=1 + registers),
        resampling=Resampling(f"transformers' Dinov2{name}Model", 0.0, filtered),
        notes=notes,
    )
