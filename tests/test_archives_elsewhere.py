"""Archives in an environment that has their pinned packages and nothing of this repository."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import DYNAMIC_BATCH, REPOSITORY, succeeds

import components
from adapt.template import networks
from components.phantom.dataset import write_phantom_dataset
from release.__main__ import build
from release.bundles import PACKED

pytestmark = pytest.mark.slow

HEADS = [f"{name}_acdc" for name, network in networks().items() if "head" in network]

CHECK_EXPORTS = """
import sys
import numpy as np, onnxruntime, torch
from monai.bundle import create_workflow, load

bundle, folder = sys.argv[1:]
root = f"{folder}/{bundle}"
sys.path.insert(0, root)
override = {"precision": "fp32"}  # as exported
network = load(bundle, bundle_dir=folder, workflow_type="inference", args_file={"bundle_root": root},
               net_override=override).eval()
workflow = create_workflow(config_file=f"{root}/configs/inference.json", workflow_type="infer", bundle_root=root,
                           dataset_dir=sys.argv[2])
assert workflow.check_properties() == []

torch.manual_seed(0)
images = torch.randint(0, 256, (3, 1, 176, 176)).float().expand(-1, 3, -1, -1)
session = onnxruntime.InferenceSession(f"{root}/models/model.onnx")
with torch.no_grad():
    eager = network(images).numpy()
    scripted = torch.jit.load(f"{root}/models/model.ts")(images).numpy()
for others in (scripted, session.run(None, {"image": images.contiguous().numpy()})[0]):
    error, spread = np.abs(others - eager).max(), eager.max() - eager.min()
    assert error < 1e-3 * spread, (error, spread)
    best = np.sort(eager, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * error
    same = others.argmax(1) == eager.argmax(1)
    assert same[clear].all()
    assert same.mean() >= 0.9999
"""
CHECK_ONNX = """
import sys
import onnxruntime, torch
from monai.networks.utils import convert_to_onnx
from components.networks.heads import LinearHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.sam.encoder import SamEncoder

model_type, path, options = sys.argv[1:]
torch.manual_seed(0)
network = PromptFreeSam(SamEncoder(model_type, image_size=64), LinearHead(4), precision="fp32").eval()
images = torch.rand(3, 3, 64, 64) * 255
convert_to_onnx(network, [images[:2]], filename=path, **eval(options))
with torch.no_grad():
    eager = network(images)
(logits,) = onnxruntime.InferenceSession(path).run(None, {"image": images.numpy()})
error, spread = (torch.from_numpy(logits) - eager).abs().max(), eager.max() - eager.min()
assert error < 1e-4 * spread, (error, spread)
"""
CHECK_PROPERTIES = """
import sys
from monai.bundle import create_workflow

config, workflow_type, data = sys.argv[1:]
assert create_workflow(config_file=config, workflow_type=workflow_type, dataset_dir=data).check_properties() == []
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """PINNED_PYTHON, or the Python of a fresh environment with the pins, and what ONNX and the schema need."""
    if "PINNED_PYTHON" in os.environ:
        return os.environ["PINNED_PYTHON"]
    folder = tmp_path_factory.mktemp("environment")
    metadata = json.loads((REPOSITORY / "bundles/autosam_acdc/configs/metadata.json").read_text())
    pins = {"monai": metadata["monai_version"], "numpy": metadata["numpy_version"]}
    pins |= metadata["required_packages_version"]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin/python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={metadata['pytorch_version']}"], check=True)
    subprocess.run([*pip, *(f"{name}=={version}" for name, version in pins.items())], check=True)
    subprocess.run([*pip, "onnx", "onnxscript", "onnxruntime", "jsonschema"], check=True)
    return python


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A local server with the archives."""
    folder = tmp_path_factory.mktemp("served")
    build(str(folder))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(*command: str, cwd: Path) -> str:
    return succeeds(subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False))


@pytest.mark.parametrize("bundle", PACKED)
def test_downloaded_archive_does_all_that_a_zoo_bundle_does(bundle, python, address, metadata_schema, tmp_path):
    monai = (python, "-m", "monai.bundle")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    url = f"{address}/{bundle}_v{components.__version__}.zip"
    run(*monai, "download", "--name", bundle, "--url", url, "--bundle_dir", str(tmp_path), cwd=elsewhere)
    root = tmp_path / bundle
    meta = ("--meta_file", f"{root}/configs/metadata.json")
    net = (*meta, "--net_id", "network_def", "--config_file", f"{root}/configs/inference.json")
    run(*monai, "verify_metadata", *meta, "--filepath", metadata_schema, cwd=elsewhere)
    run(*monai, "verify_net_in_out", *net, "--bundle_root", str(root), cwd=root)

    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 3))
    volume = next(Path(data).rglob("*frame01.nii.gz"))
    infer = (*monai, "run", "--config_file", f"{root}/configs/inference.json", "--bundle_root", str(root))
    run(*infer, "--dataset_dir", str(volume), "--output_dir", str(tmp_path / "out"), cwd=elsewhere)
    first = nib.load(tmp_path / "out" / volume.name.replace(".nii.gz", "_pred.nii.gz"))
    assert first.shape == nib.load(volume).shape
    assert np.unique(np.asarray(first.dataobj)).tolist() == [0, 1, 2, 3]

    exporting = ("--ckpt_file", "models/model.pt")
    run(*monai, "ckpt_export", *net, *exporting, "--filepath", "models/model.ts", cwd=root)
    shape = ("--input_shape", "[2,3,176,176]", "--converter_kwargs", str(DYNAMIC_BATCH))
    run(*monai, "onnx_export", *net, *exporting, "--filepath", "models/model.onnx", *shape, cwd=root)
    run(python, "-c", CHECK_EXPORTS, bundle, str(tmp_path), cwd=elsewhere)

    before = (root / "models/model.pt").read_bytes()
    training = ("run", "training", "--config_file", "configs/train.json", "--dataset_dir", data)
    small = ("--epochs", "1", "--views", "1", "--train#prepare_batch#pool_size", "4", "--learning_rate", "1e-5")
    run(*monai, *training, *small, cwd=root)
    assert (root / "models/model.pt").read_bytes() != before
    assert not (root / "components/__init__.py").is_symlink()


@pytest.mark.parametrize("model_type", ["vit_t", "phantom_unet"])
def test_encoder_of_another_type_runs_in_onnx(model_type, python, tmp_path):
    path = str(tmp_path / "model.onnx")
    run(python, "-c", CHECK_ONNX, model_type, path, str(DYNAMIC_BATCH), cwd=REPOSITORY)


@pytest.mark.parametrize("bundle", HEADS)
def test_vit_b_archive_passes_the_zoos_checks_once_its_checkpoint_is_there(
    bundle, python, sam_checkpoint, metadata_schema, tmp_path
):
    build(str(tmp_path), model_type="vit_b", bundle=bundle)
    name = f"{bundle}_vit_b_v{components.__version__}.zip"
    run(sys.executable, "-m", "zipfile", "-e", name, ".", cwd=tmp_path)
    root = tmp_path / f"{bundle}_vit_b"
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 2))
    (root / "models").mkdir()
    (root / "models/sam_vit_b_01ec64.pth").symlink_to(sam_checkpoint)

    monai, meta = (python, "-m", "monai.bundle"), ("--meta_file", "configs/metadata.json")
    training = ("run", "training", "--config_file", "configs/train.json", "--dataset_dir", data)
    run(*monai, *training, "--image_size", "64", "--epochs", "1", "--views", "1", cwd=root)
    net = (*meta, "--net_id", "network_def", "--config_file", "configs/inference.json")
    run(*monai, "verify_metadata", *meta, "--filepath", metadata_schema, cwd=root)
    run(*monai, "verify_net_in_out", *net, cwd=root)  # at 64 pixels, as trained
    run(*monai, "ckpt_export", *net, "--ckpt_file", "models/model.pt", "--filepath", "models/model.ts", cwd=root)
    for workflow_type, config in (("train", "train"), ("infer", "inference")):
        run(python, "-c", CHECK_PROPERTIES, f"configs/{config}.json", workflow_type, data, cwd=root)
