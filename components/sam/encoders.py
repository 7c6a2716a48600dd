"""The table of image encoders: all that distinguishes one from another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from components.base.weights import join_keys
from components.sam.checkpoint import SAM_FORM, is_sam_key, sam_image_encoder
from components.sam.dino_encoder import (
    CONVNEXT_MULTIPLE,
    CONVNEXT_STRIDE,
    CONVNEXTS,
    DINO2_PATCH,
    DINO2_SIZE,
    DINO3_PATCH,
    DINO3_SIZE,
    DINO_FORM,
    VITS,
    ConvNextEncoder,
    Dino2Encoder,
    Dino3Encoder,
    convnext_image_encoder,
    dino2_image_encoder,
    dino3_image_encoder,
)
from components.sam.image_encoder import ARCHITECTURES, EMBEDDING_CHANNELS, PATCH_SIZE, Architecture, ImageEncoder
from components.sam.sam2_encoder import SAM2_ARCHITECTURES, SIZE_MULTIPLE, Hiera, Sam2Encoder, sam2_image_encoder
from components.sam.sam3_encoder import (
    SAM3_FORM,
    SAM3_MEAN,
    SAM3_PATCH,
    SAM3_SIZE,
    SAM3_STD,
    Sam3Encoder,
    Sam3Vit,
    sam3_image_encoder,
)
from components.sam.tiny_vit import CLASSIFIER_KEYS, TinyViT
from components.sam.unet_encoder import UNetEncoder

PHANTOM_UNET = "phantom_unet"  # comes with the package, for hearts
GENERAL_UNET = "general_unet"  # comes with the package, for pictures of anything
SHIPPED = (PHANTOM_UNET, GENERAL_UNET)
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of ImageNet's colours in 0..255, for SAM, SAM 2 and DINO alike
IMAGENET_STD = (58.395, 57.12, 57.375)
SAM_SIZE = 1024

Weights = Mapping[str, torch.Tensor]
Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class EncoderType:
    """Facts of one encoder, for the code and the documents.

    Args:
        family: name of the encoders to which it belongs.
        build: makes the module, with random weights, from the side of its images in pixels.
        read: returns the module's weights from a whole state dict of the family; none for any other state dict.
        form: what such a state dict holds, for messages.
        unused_keys: weights of published files that no forward pass uses; they are left out when loading.
        out_channels: channels of its embeddings.
        stride: side in pixels of a token.
        size_multiple: the side of its images is a multiple of this number of pixels.
        default_size: side in pixels to which images are resized by default; None for their own, rounded up.
        pixel_mean: of each colour in 0..255, subtracted from images.
        pixel_std: of each colour; images are divided by it.
        neck: parts that `trainable_encoder neck` trains: what makes embeddings of the last block's features.
        has_sam_decoder: whether its file holds SAM's mask decoder.
        has_sam2_decoder: whether its file holds SAM 2.1's.
        file: name of the published file; None if none can be downloaded without an account.
        url: address of that file.
        sha256: its checksum.
        page: address of the page that offers the weights.
        licence: of the weights.
        terms: a sentence on a licence that restricts their use.
    """

    family: str
    build: Callable[[int], nn.Module]
    read: Callable[[Weights], dict[str, torch.Tensor]] = sam_image_encoder
    form: str = SAM_FORM
    unused_keys: frozenset[str] = frozenset()
    out_channels: int = EMBEDDING_CHANNELS
    stride: int = PATCH_SIZE
    size_multiple: int = PATCH_SIZE
    default_size: int | None = SAM_SIZE
    pixel_mean: Colour = IMAGENET_MEAN
    pixel_std: Colour = IMAGENET_STD
    neck: tuple[str, ...] = ("neck",)
    has_sam_decoder: bool = False
    has_sam2_decoder: bool = False
    file: str | None = None
    url: str = ""
    sha256: str = ""
    page: str = ""
    licence: str = "Apache-2.0"
    terms: str = ""


def _sam(architecture: Architecture, file: str, sha256: str) -> EncoderType:
    return EncoderType(
        family="SAM",
        build=lambda _: ImageEncoder(architecture),
        has_sam_decoder=True,
        file=file,
        url=f"https://dl.fbaipublicfiles.com/segment_anything/{file}",
        sha256=sha256,
        page="https://github.com/facebookresearch/segment-anything#model-checkpoints",
    )


def _sam2(name: str, sha256: str) -> EncoderType:
    architecture: Hiera = SAM2_ARCHITECTURES[name]
    return EncoderType(
        family="SAM 2.1",
        build=partial(Sam2Encoder, architecture),
        read=sam2_image_encoder,
        form="the keys of Meta's file (image_encoder.trunk.*) or of transformers (vision_encoder.backbone.*)",
        stride=4,
        size_multiple=SIZE_MULTIPLE,
        default_size=None,
        has_sam2_decoder=True,
        file=f"{name}.pt",
        url=f"https://dl.fbaipublicfiles.com/segment_anything_2/092824/{name}.pt",
        sha256=sha256,
        page="https://github.com/facebookresearch/sam2",
    )


def _dino(size: str, *, patch_size: int, known_key: str, **facts: Any) -> EncoderType:
    architecture = VITS[size]
    return EncoderType(
        form=DINO_FORM.format(key=known_key),
        unused_keys=frozenset({"embeddings.mask_token"}),
        out_channels=architecture.embed_dim,
        stride=patch_size,
        size_multiple=patch_size,
        neck=(f"layer.{architecture.depth - 1}", "norm"),
        **facts,
    )


def _dino2(size: str, name: str) -> EncoderType:
    return _dino(
        size,
        patch_size=DINO2_PATCH,
        known_key="embeddings.position_embeddings",
        family="DINOv2",
        build=partial(Dino2Encoder, VITS[size]),
        read=dino2_image_encoder,
        default_size=DINO2_SIZE,
        page=f"https://huggingface.co/facebook/dinov2-{name}",
    )


DINO3_LICENCE = "DINOv3 License"
DINO3_TERMS = (
    "The weights of DINOv3 are under Meta's DINOv3 License, which you accept on their page; it goes with every copy."
)


def _dino3(size: str) -> EncoderType:
    return _dino(
        size,
        patch_size=DINO3_PATCH,
        known_key="embeddings.register_tokens",
        family="DINOv3",
        build=partial(Dino3Encoder, VITS[size]),
        read=dino3_image_encoder,
        default_size=DINO3_SIZE,
        page=f"https://huggingface.co/facebook/dinov3-vit{size}16-pretrain-lvd1689m",
        licence=DINO3_LICENCE,
        terms=DINO3_TERMS,
    )


def _convnext(size: str) -> EncoderType:
    architecture = CONVNEXTS[size]
    return EncoderType(
        family="DINOv3",
        build=partial(ConvNextEncoder, architecture),
        read=convnext_image_encoder,
        form=DINO_FORM.format(key="stages.0.downsample_layers.0.weight"),
        unused_keys=frozenset({"layer_norm.weight", "layer_norm.bias"}),
        out_channels=sum(architecture.widths),
        stride=CONVNEXT_STRIDE,
        size_multiple=CONVNEXT_MULTIPLE,
        default_size=None,
        neck=("stages.3",),
        page=f"https://huggingface.co/facebook/dinov3-convnext-{size}-pretrain-lvd1689m",
        licence=DINO3_LICENCE,
        terms=DINO3_TERMS,
    )


def _unet(*, has_sam_decoder: bool) -> EncoderType:
    return EncoderType(
        family="this project",
        build=lambda _: UNetEncoder(),
        stride=4,
        default_size=None,
        neck=("up_4", "neck"),
        has_sam_decoder=has_sam_decoder,
    )


# Source of the checksums: micro-sam's registry of Meta's files, and the file that several projects pin for MobileSAM.
ENCODERS: dict[str, EncoderType] = {
    "vit_b": _sam(
        ARCHITECTURES["vit_b"],
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": _sam(
        ARCHITECTURES["vit_l"],
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": _sam(
        ARCHITECTURES["vit_h"],
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "vit_tiny": EncoderType(
        family="this project", build=lambda _: ImageEncoder(ARCHITECTURES["vit_tiny"]), has_sam_decoder=True
    ),
    "vit_t": EncoderType(
        family="MobileSAM",
        build=lambda _: TinyViT(),
        unused_keys=CLASSIFIER_KEYS,
        has_sam_decoder=True,
        file="mobile_sam.pt",
        url="https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights/mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        page="https://github.com/ChaoningZhang/MobileSAM",
    ),
    PHANTOM_UNET: _unet(has_sam_decoder=True),
    GENERAL_UNET: _unet(has_sam_decoder=False),
    "sam2.1_hiera_tiny": _sam2("sam2.1_hiera_tiny", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    "sam2.1_hiera_small": _sam2(
        "sam2.1_hiera_small", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"
    ),
    "sam2.1_hiera_base_plus": _sam2(
        "sam2.1_hiera_base_plus", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"
    ),
    "sam2.1_hiera_large": _sam2(
        "sam2.1_hiera_large", "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"
    ),
    "dinov2_vits": _dino2("s", "small"),
    "dinov2_vitb": _dino2("b", "base"),
    "dinov2_vitl": _dino2("l", "large"),
    **{f"dinov3_vit{size}": _dino3(size) for size in VITS},
    **{f"dinov3_convnext_{size}": _convnext(size) for size in CONVNEXTS},
    "sam3": EncoderType(
        family="SAM 3",
        build=partial(Sam3Encoder, Sam3Vit()),
        read=sam3_image_encoder,
        form=SAM3_FORM,
        stride=SAM3_PATCH,
        size_multiple=SAM3_PATCH,
        default_size=SAM3_SIZE,
        pixel_mean=SAM3_MEAN,
        pixel_std=SAM3_STD,
        page="https://huggingface.co/facebook/sam3",
        licence="SAM License",
        terms=(
            "The weights of SAM 3 are under Meta's SAM License, which you accept on their page; it goes with every "
            "copy and rules out military and similar uses."
        ),
    ),
}


def encoder_type(model_type: str) -> EncoderType:
    """Return the entry of a model type.

    Raises:
        ValueError: if there is no such encoder.
    """
    if model_type not in ENCODERS:
        raise ValueError(f"unknown model_type {model_type!r}: expected one of {', '.join(ENCODERS)}")
    return ENCODERS[model_type]


def page_of(model_type: str | None) -> str:
    """Return the address of the page that offers an encoder's weights, empty if there is none."""
    return ENCODERS[model_type].page if model_type in ENCODERS else ""


def published_encoders() -> dict[str, EncoderType]:
    """Return the encoders whose file anyone can download, by model type."""
    return {name: entry for name, entry in ENCODERS.items() if entry.file}


def family_of(state: Weights) -> EncoderType | None:
    """Return an encoder of the family whose weights a whole state dict holds; None for an unknown state dict."""
    # SAM's reader comes last, since its keys include those of others.
    one_of_each = {entry.read: entry for entry in ENCODERS.values()}
    readers = sorted(one_of_each, key=lambda read: read is sam_image_encoder)
    return next((one_of_each[read] for read in readers if read(state)), None)


def encoder_weights(state: Weights, model_type: str, expected: Weights, *, path: str) -> dict[str, torch.Tensor]:
    """Return the weights of an image encoder from a whole state dict.

    Args:
        state: as `components.sam.checkpoint.read_checkpoint` returns it.
        model_type: the encoder.
        expected: its module's state dict.
        path: the file, for messages.

    Returns:
        tensors by key, under the module's own names.

    Raises:
        ValueError: if the state dict is of another encoder, or of none in the table.
    """
    entry, family = encoder_type(model_type), family_of(state)
    if family is None:
        strange = [key for key in state if not is_sam_key(key)] or list(state)
        raise ValueError(
            f"{path} is not a checkpoint of {model_type}: expected {entry.form}; received also {join_keys(strange)}"
        )
    weights = _used(entry if entry.read is family.read else family, state)
    if _shapes(weights) == _shapes(expected):
        return weights
    for other, candidate in ENCODERS.items():
        if candidate.read is not family.read:
            continue  # building it may need a package of its own
        with torch.device("meta"):
            shapes = _shapes(candidate.build(candidate.size_multiple).state_dict())
        if _shapes(_used(candidate, state)) == shapes:
            raise ValueError(
                f"{path} is a {other} checkpoint, but model_type is {model_type}: "
                f"give --model_type {other}, or --sam_checkpoint a {model_type} file"
            )
    return weights


def _used(entry: EncoderType, state: Weights) -> dict[str, torch.Tensor]:
    return {key: value for key, value in entry.read(state).items() if key not in entry.unused_keys}


def _shapes(state: Weights) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}
