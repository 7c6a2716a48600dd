"""Pre-training of the UNet without labels, and a training that starts from it."""

import pytest
import torch
from conftest import REPOSITORY, run_monai_bundle_here
from monai.losses import ContrastiveLoss
from monai.transforms import RandGaussianNoised

from components.networks.contrastive import ContrastiveUNet, TwoViews
from components.networks.unet import CONTRACTING_PATH, GreyUNet
from components.phantom.dataset import write_phantom_dataset


def test_views_differ_from_each_other_and_come_again_with_the_seed():
    views = TwoViews(RandGaussianNoised(keys="image", prob=1.0, std=10))
    image = torch.rand(1, 8, 8)
    drawn = [views.set_random_state(seed=0)({"image": image}) for _ in range(2)]
    assert drawn[0].keys() == {"image", "other"}
    assert not torch.equal(drawn[0]["image"], drawn[0]["other"])
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])


def test_vectors_of_a_slices_views_come_closer_by_training():
    torch.manual_seed(0)
    network = ContrastiveUNet(width=4, precision="fp32")
    images = torch.rand(6, 1, 32, 32).mul(255).expand(-1, 3, -1, -1)
    views = torch.cat([images, (images * 0.9 + 5).flip(3)])
    loss, optimizer = ContrastiveLoss(temperature=0.5), torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss(*network(views).chunk(2)))
        losses[-1].backward()
        optimizer.step()
    assert network(views).shape == (12, 128)
    assert losses[-1] < losses[0] - 0.3


def test_unet_starts_from_the_pretrained_contracting_path(tmp_path):
    pretrained = ContrastiveUNet(width=2).state_dict()
    torch.save(pretrained, tmp_path / "model.pt")
    state = GreyUNet(4, width=2, start_checkpoint=str(tmp_path / "model.pt")).state_dict()
    path = {key for key in state if key.startswith(tuple(f"unet.{part}." for part in CONTRACTING_PATH))}
    assert path == {key for key in pretrained if not key.startswith("projection.")}
    assert all(torch.equal(state[key], pretrained[key]) for key in path)
    with pytest.raises(ValueError, match="does not fit"):
        GreyUNet(4, width=4, start_checkpoint=str(tmp_path / "model.pt"))


def test_pretraining_needs_no_label_and_training_starts_from_it(tmp_path):
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 2))
    knobs = {"dataset_dir": data, "output_dir": str(tmp_path / "eval"), "width": "2", "crop_size": "64", "epochs": "1"}

    def run(run_id: str, overlays: tuple[str, ...], **others: str) -> str:
        files = str([f"configs/{name}.json" for name in ("train", *overlays)])
        options = [text for name, value in (knobs | others).items() for text in (f"--{name}", value)]
        arguments = ("run", run_id, "--config_file", files, *options)
        return run_monai_bundle_here(*arguments, cwd=REPOSITORY / "bundles/unet_acdc")

    truths = list((tmp_path / "phantoms").rglob("*_gt.nii.gz"))
    contents = [path.read_bytes() for path in truths]
    for path in truths:
        path.write_bytes(b"not to be read")
    run("pretraining", ("pretrain",), ckpt_dir=str(tmp_path / "pretrained"))
    for path, content in zip(truths, contents, strict=True):
        path.write_bytes(content)
    start = str(tmp_path / "pretrained/model.pt")
    assert f"the network starts from {start}" in run(
        "training", (), ckpt_dir=str(tmp_path / "models"), start_checkpoint=start, phantom_share="0"
    )
    assert (tmp_path / "models/model.pt").is_file()
