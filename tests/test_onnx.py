"""`configs/inference_onnx.json`: an exported network that ONNX Runtime or OpenVINO computes."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import DYNAMIC_BATCH, REPOSITORY, run_monai_bundle, run_monai_bundle_here

from components.networks.onnx_network import OnnxNetwork
from components.phantom.dataset import write_phantom_dataset
from components.pretrained import pretrained_file

CONFIG = "configs/inference.json"


@pytest.mark.parametrize(
    ("bundle", "weights"),
    [("linearhead_acdc", "linear_head.pt"), pytest.param("unet_acdc", "unet.pt", marks=pytest.mark.slow)],
)
def test_exported_network_segments_like_the_one_it_was_exported_from(bundle, weights, tmp_path):
    def run(*arguments: str) -> None:
        run_monai_bundle_here(*arguments, cwd=REPOSITORY / "bundles" / bundle)

    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=1, size_hw_d=(96, 80, 3))
    volume = next(Path(data).rglob("*frame01.nii.gz"))
    file = ("--meta_file", "configs/metadata.json", "--net_id", "network_def", "--ckpt_file", pretrained_file(weights))
    shape = ("--input_shape", "[2,3,176,176]", "--converter_kwargs", str(DYNAMIC_BATCH))
    run("onnx_export", "--config_file", CONFIG, *file, "--filepath", str(tmp_path / "model.onnx"), *shape)
    inferring = ("run", "inferring", "--dataset_dir", str(volume), "--test_time_views", "1")
    run(*inferring, "--config_file", CONFIG, "--precision", "fp32", "--output_dir", str(tmp_path / "eager"))
    overlaid = f"['{CONFIG}','configs/inference_onnx.json']"
    name = volume.name.replace(".nii.gz", "_pred.nii.gz")
    eager = np.asarray(nib.load(tmp_path / "eager" / name).dataobj)
    assert np.unique(eager).tolist() == [0, 1, 2, 3]
    onnx = ("--onnx_path", str(tmp_path / "model.onnx"))
    for engine, precision, most in (("onnxruntime", "fp32", 2), ("openvino", "fp32", 2), ("openvino", "bf16", 60)):
        folder = tmp_path / f"{engine}-{precision}"
        how = ("--engine", engine, "--precision", precision, "--output_dir", str(folder))
        options = ("--config_file", overlaid, *onnx, *how)
        if engine == "openvino":  # in a process of its own, as a fault of its C++ code would end this one
            run_monai_bundle(*inferring, *options, cwd=REPOSITORY / "bundles" / bundle).check_returncode()
        else:
            run(*inferring, *options)
        exported = np.asarray(nib.load(folder / name).dataobj)
        assert np.count_nonzero(eager != exported) <= most, folder.name  # of 23,040


def test_missing_file_is_named_with_the_way_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no exported network at .*onnx_export.*--onnx_path FILE"):
        OnnxNetwork(str(tmp_path / "model.onnx"))


def test_an_engine_that_cannot_is_refused_in_one_line(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="unknown engine 'torch': expected onnxruntime or openvino"):
        OnnxNetwork(str(path), "torch")
    with pytest.raises(ValueError, match=r"ONNX Runtime computes in fp32 here: give --precision auto, or --engine"):
        OnnxNetwork(str(path), precision="bf16")
