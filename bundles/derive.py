"""Write the bundles that differ from `autosam_acdc` in their head or network only, or check that they do.

`autosam_acdc` is the source. Every other bundle is the same text with the replacements listed here, file by file, so a
change is made once: edit `autosam_acdc`, then run `python bundles/derive.py`. `python bundles/derive.py --check` writes
nothing and fails when a file is not what it would write.
"""

import argparse
import sys
from pathlib import Path

BUNDLES = Path(__file__).parent
SOURCE = "autosam_acdc"
# Files that make up a bundle; what else lies in its folder was made by running it.
FILES = ("LICENSE", "large_files.yml", "configs/*.json", "configs/logging.conf", "docs/*")

# What a bundle does without.
WITHOUT = {
    "cnnhead_acdc": ("configs/demo.json",),  # shows how fast the source's own head learns
    "linearhead_acdc": ("configs/demo.json",),
    "unet_acdc": ("configs/demo.json", "configs/tiny.json", "large_files.yml"),
}
# What a bundle has of its own.
OWN = {"unet_acdc": ("configs/phantoms.json", "configs/pretrain.json", "configs/small.json", "docs/README.md")}

HEAD_OF_SOURCE = """        "head": {
            "_target_": "components.networks.ViTHead",
            "out_channels": "@out_channels",
            "checkpoint": "@sam_checkpoint"
        },
"""
KNOB_OF_ENCODER = '    "trainable_encoder": false,\n'
HEAD_CHECKPOINT_OF_SOURCE = '"name": "vit_head.pt"},\n'
ADAPTING_RATE_OF_SOURCE = '    "learning_rate": 0.0002,\n'
ADAPTING_RATE = '    "learning_rate": 0.0005,\n'

Replacements = dict[str, str]

ENCODER_KNOBS = """    "model_type": "vit_b",
    "sam_checkpoint": {
        "_target_": "components.sam.default_checkpoint",
        "models_dir": "$@bundle_root + '/models'",
        "model_type": "@model_type"
    },
    "image_size": 1024,
    "head_checkpoint": null,
    "trainable_encoder": false,
    "precision": "auto",
"""
CACHE_KNOBS = """    "cache_dir": "$None if @trainable_encoder else @bundle_root + '/../embeddings'",
    "cache_gb": 16,
"""
ENCODER = """        "_target_": "components.networks.PromptFreeSam",
        "encoder": {
            "_target_": "components.sam.SamEncoder",
            "model_type": "@model_type",
            "checkpoint": "@sam_checkpoint",
            "image_size": "@image_size",
            "trainable": "@trainable_encoder"
        },
"""
CACHING_ENCODER = ENCODER.replace(
    '"@trainable_encoder"\n',
    '"@trainable_encoder",\n            "cache_dir": "@cache_dir",\n            "cache_gb": "@cache_gb"\n',
)
CACHE_REPORT = """,
            {"_target_": "components.embeddings.EmbeddingCacheReport", "network": "@network"}
"""
UNET = """        "_target_": "components.networks.GreyUNet",
        "out_channels": "@out_channels",
        "width": "@width",
"""
AUGMENTATION = """\
                {"_target_": "Rand2DElasticd", "keys": ["image", "label"], "prob": 0.9, "spacing": [32, 32], "magnitude_range": [0, 3], "rotate_range": 0.35, "scale_range": 0.1, "mode": ["bilinear", "nearest"], "padding_mode": "zeros"},
                {"_target_": "RandScaleIntensityd", "keys": "image", "prob": 0.5, "factors": 0.25},
                {"_target_": "RandShiftIntensityd", "keys": "image", "prob": 0.5, "offsets": 25},
                {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.5, "std": 10},
"""  # noqa: E501
UNET_AUGMENTATION = """\
                {"_target_": "Rand2DElasticd", "keys": ["image", "label"], "prob": 1.0, "spacing": [32, 32], "magnitude_range": [0, 3], "rotate_range": 1.0, "scale_range": 0.3, "translate_range": 20, "mode": ["bilinear", "nearest"], "padding_mode": "zeros"},
                {"_target_": "RandAxisFlipd", "keys": ["image", "label"], "prob": 0.5},
                {"_target_": "RandRotate90d", "keys": ["image", "label"], "prob": 0.3, "max_k": 3},
                {"_target_": "RandAdjustContrastd", "keys": "image", "prob": 0.5, "gamma": [0.5, 2.0]},
                {"_target_": "RandScaleIntensityd", "keys": "image", "prob": 0.5, "factors": 0.3},
                {"_target_": "RandShiftIntensityd", "keys": "image", "prob": 0.5, "offsets": 25},
                {"_target_": "RandGaussianSmoothd", "keys": "image", "prob": 0.2, "sigma_x": [0.5, 1.5], "sigma_y": [0.5, 1.5]},
                {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.5, "std": 10},
"""  # noqa: E501
UNET_KNOBS = """    "start_checkpoint": null,
    "width": 64,
    "precision": "auto",
"""

CNN_CONFIG: Replacements = {
    HEAD_OF_SOURCE: """        "head": {
            "_target_": "components.networks.CNNHead",
            "out_channels": "@out_channels",
            "depth": "@depth"
        },
""",
    KNOB_OF_ENCODER: KNOB_OF_ENCODER + '    "depth": 4,\n',
}
LINEAR_CONFIG: Replacements = {
    HEAD_OF_SOURCE: """        "head": {
            "_target_": "components.networks.LinearHead",
            "out_channels": "@out_channels"
        },
""",
}
METADATA_NAME = '"name": "AutoSAM (ViT head) on ACDC"'
METADATA_HEAD = "a prompt-free ViT head made of SAM's own mask decoder"
README_TITLE = "# AutoSAM: ViT head on ACDC"
README_HEAD = """\
The head is SAM's own mask decoder without prompts ("AutoSAM" in the paper): each class has its own copy of SAM's output
tokens, and all else of the decoder starts from SAM's weights. 3,510,144 parameters train."""
README_KNOB = '| `trainable_encoder` | `false` | train the encoder along (the paper\'s "AutoSAM (ft all)") |\n'

# bundle -> file -> text of the source -> text instead
DERIVED: dict[str, dict[str, Replacements]] = {
    "cnnhead_acdc": {
        "configs/train.json": CNN_CONFIG,
        "configs/inference.json": CNN_CONFIG,
        "configs/tiny.json": {
            HEAD_CHECKPOINT_OF_SOURCE: '"name": "cnn_head.pt"},\n    "depth": 2,\n',
            ADAPTING_RATE_OF_SOURCE: ADAPTING_RATE,
        },
        "configs/metadata.json": {
            METADATA_NAME: '"name": "SAM encoder with CNN head on ACDC"',
            METADATA_HEAD: "a convolutional head of k stages",
        },
        "docs/README.md": {
            README_TITLE: "# SAM encoder with CNN head on ACDC",
            README_HEAD: """\
The head is a convolutional decoder of `depth` = k stages ("Encoder + CNN" in the paper) whose output is 4 times its
input's size at every k. 1,808,132 / 5,610,500 / 20,686,340 / 80,722,436 parameters train at k = 2 / 3 / 4 / 5.""",
            README_KNOB: README_KNOB + "| `depth` | `4` | stages k of the CNN head, at least 2 |\n",
        },
    },
    "linearhead_acdc": {
        "configs/train.json": LINEAR_CONFIG,
        "configs/inference.json": LINEAR_CONFIG,
        "configs/tiny.json": {
            HEAD_CHECKPOINT_OF_SOURCE: '"name": "linear_head.pt"},\n',
            ADAPTING_RATE_OF_SOURCE: ADAPTING_RATE,
        },
        "configs/metadata.json": {
            METADATA_NAME: '"name": "SAM encoder with linear head on ACDC"',
            METADATA_HEAD: "a linear head",
        },
        "docs/README.md": {
            README_TITLE: "# SAM encoder with linear head on ACDC",
            README_HEAD: """\
The head is two transposed convolutions and two point-wise ones ("Encoder + LN" in the paper), a probe of what the
encoder's features hold. 75,140 parameters train.""",
        },
    },
    "unet_acdc": {
        "configs/train.json": {
            "a prompt-free head on SAM's frozen image encoder": "a UNet",
            ENCODER_KNOBS + CACHE_KNOBS: UNET_KNOBS,
            CACHING_ENCODER + HEAD_OF_SOURCE: UNET,
            '"head_checkpoint": "@head_checkpoint"\n': '"start_checkpoint": "@start_checkpoint"\n',
            '"views": 16,': '"views": 0,',
            AUGMENTATION: UNET_AUGMENTATION,
            "$@head_checkpoint is not None": "$@start_checkpoint is not None",
            CACHE_REPORT: "\n",
        },
        "configs/evaluate.json": {
            "the trained head": "the trained UNet",
            CACHE_REPORT.replace("            ", "        "): "\n",
        },
        "configs/inference.json": {
            "a trained head. epochs, learning_rate and phantom_share are for training alone; they stand here so that "
            "tiny.json fits both configs.": "a trained UNet.",
            "$@head_checkpoint or ": "$",
            ENCODER_KNOBS: UNET_KNOBS.replace('    "start_checkpoint": null,\n', ""),
            '    "epochs": 120,\n    "learning_rate": 0.0005,\n    "phantom_share": 0,\n': "",
            ENCODER + HEAD_OF_SOURCE: UNET,
        },
        "configs/inference_ts.json": {
            ", which holds encoder and head: neither ckpt_path nor sam_checkpoint is read": "; ckpt_path is not read"
        },
        "configs/multi_gpu_train.json": {'    "train#handlers#7#_disabled_": "@is_silent",\n': ""},
        "configs/multi_gpu_evaluate.json": {'    "validate#handlers#4#_disabled_": "@is_silent",\n': ""},
        "configs/metadata.json": {
            METADATA_NAME: '"name": "UNet on ACDC"',
            f"SAM's image encoder, frozen, under {METADATA_HEAD}": "MONAI's UNet, all weights",
        },
    },
}


def expected_files() -> dict[Path, str]:
    """Return the text that every file of every derived bundle should have.

    Raises:
        ValueError: when a text to replace does not stand exactly once in its file.
    """
    source = BUNDLES / SOURCE
    files = {}
    for bundle, replacements in DERIVED.items():
        for path in sorted(path for pattern in FILES for path in source.glob(pattern)):
            name = path.relative_to(source).as_posix()
            if name in WITHOUT[bundle] or name in OWN.get(bundle, ()):
                continue
            text = path.read_text(encoding="utf-8")
            for old, new in replacements.get(name, {}).items():
                if text.count(old) != 1:
                    raise ValueError(f"expected once in {SOURCE}/{name}, found {text.count(old)} times: {old!r}")
                text = text.replace(old, new)
            files[BUNDLES / bundle / name] = text.replace(SOURCE, bundle)
    return files


def differing_files() -> list[Path]:
    """Return the files of derived bundles that are missing, extra or other than expected."""
    expected = expected_files()
    extra = [
        path
        for bundle in DERIVED
        for pattern in FILES
        for path in (BUNDLES / bundle).glob(pattern)
        if path not in expected and path.relative_to(BUNDLES / bundle).as_posix() not in OWN.get(bundle, ())
    ]
    return extra + [
        path for path, text in expected.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Write the derived bundles, or with `--check` report what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a file would change")
    if parser.parse_args().check:
        differing = differing_files()
        if differing:
            sys.exit(f"not derived from {SOURCE}, run `python bundles/derive.py`: {', '.join(map(str, differing))}")
        return
    for path, text in expected_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
