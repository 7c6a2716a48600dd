"""Pre-training on phantoms: the stream, the joint head, killed and resumed runs, and what is exported."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import monai.bundle
import pytest
import torch
from conftest import REPOSITORY, assert_readme_explains_knobs, messages_of
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from torch import nn

import components
from components.networks.heads import CNNHead, DeepLabHead, LinearHead, ViTHead
from components.networks.prompt_free_sam import PromptFreeSam
from components.phantom.slices import phantom_slices
from components.pretrained import pretrained_file
from components.pretraining import phantom_stream
from components.pretraining.joint_head import JointHead
from components.pretraining.optimization import parameter_groups
from components.pretraining.phantom_stream import PhantomStream, phantom_stacks
from components.pretraining.record import command_without_folders
from components.sam.checkpoint import read_sam_checkpoint
from components.sam.encoder import SamEncoder

BUNDLE = REPOSITORY / "bundles" / "phantom_encoder"
TINY = {
    "model_type": "vit_tiny",
    "canvas_size": 64,
    "image_size": 64,
    "batch_size": 4,
    "steps_per_epoch": 2,
    "epochs": 2,
    "val_interval": 1,
}
TINY |= {"val_stacks": 1, "slices_per_stack": 3}
HEADS = {
    "vit": lambda: ViTHead(4),
    "cnn": lambda: CNNHead(4, depth=2),
    "deeplab": lambda: DeepLabHead(4),
    "linear": lambda: LinearHead(4),
}


def config(*names: str) -> list[str]:
    return [str(BUNDLE / "configs" / f"{name}.json") for name in names]


def train(folder: Path, **overrides) -> None:
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(folder), "output_dir": str(folder / "eval")}
    monai.bundle.run("training", config_file=config("train"), **{**TINY, **folders, **overrides})


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint_epoch=2.pt", weights_only=True)["model"]


def is_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The checkpoints of an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def export_dir(trained, tmp_path_factory) -> Path:
    """The files exported from that run."""
    folder = tmp_path_factory.mktemp("exported")
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(trained), "export_dir": str(folder)}
    monai.bundle.run("exporting", config_file=config("train", "export"), **TINY, **folders)
    return folder


class Counting(nn.Module):
    """A head whose logits tell its number and the slice, and which counts the slices it receives."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.seen = 0

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        self.seen += len(embeddings)
        return embeddings[:, :2] * 10 + self.number


def test_in_training_each_slice_goes_through_one_head_in_turn():
    heads = {"a": Counting(1), "b": Counting(2), "c": Counting(3)}
    embeddings = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 256, 1, 1)
    logits = JointHead(heads)(embeddings)
    assert logits.shape == (6, 2, 1, 1)
    assert logits[:, 0, 0, 0].tolist() == [1, 12, 23, 31, 42, 53]
    assert [head.seen for head in heads.values()] == [2, 2, 2]


def test_in_evaluation_each_slice_goes_through_every_head():
    logits = JointHead({"a": Counting(1), "b": Counting(2)}).eval()(torch.zeros(3, 256, 1, 1))
    assert logits[:, :, 0, 0].tolist() == [[1, 1, 2, 2]] * 3


def test_batch_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="--batch_size a multiple of 2"):
        JointHead({"a": Counting(1), "b": Counting(2)})(torch.zeros(3, 256, 1, 1))


def test_gradients_of_one_step_reach_the_encoder_and_every_head():
    network = PromptFreeSam(
        SamEncoder("vit_tiny", image_size=64, trainable=True), JointHead({name: make() for name, make in HEADS.items()})
    )
    network(torch.rand(len(HEADS), 3, 64, 64) * 255).square().mean().backward()
    without = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in without if "rel_pos" not in name] == []


def test_only_weights_of_products_and_convolutions_decay():
    network = PromptFreeSam(SamEncoder("vit_tiny", image_size=64, trainable=True), ViTHead(4))
    names = {id(weight): name for name, weight in network.named_parameters()}
    decaying, others = [{names[id(weight)] for weight in group["params"]} for group in parameter_groups(network, 0.1)]
    assert len(decaying) + len(others) == len(names)
    assert {"encoder.image_encoder.patch_embed.proj.weight", "head.hypernetwork.layers.0.weight"} <= decaying
    spared = {
        "pos_embed",
        "blocks.0.attn.rel_pos_h",
        "blocks.0.norm1.weight",
        "neck.1.weight",
        "blocks.0.mlp.lin1.bias",
    }
    assert {f"encoder.image_encoder.{name}" for name in spared} | {"head.tokens"} <= others


def test_stream_goes_on_from_any_position_and_differs_by_seed():
    stream = PhantomStream(2, seed=1, size=64)
    batches = [batch for batch, _ in zip(stream, range(3), strict=False)]
    assert batches[0]["image"].shape == (2, 3, 64, 64)
    assert batches[0]["label"].shape == (2, 1, 64, 64)
    later = PhantomStream(2, seed=1, size=64)
    later.position = 2
    batch = next(iter(later))
    assert torch.equal(batch["image"], batches[2]["image"])
    assert torch.equal(batch["label"], batches[2]["label"])
    assert not torch.equal(batch["image"], batches[1]["image"])
    assert not torch.equal(batches[0]["image"], next(iter(PhantomStream(2, seed=2, size=64)))["image"])


def test_stream_widens_batch_by_batch_whatever_it_resumes_from():
    def draw(position, **options):
        stream = PhantomStream(2, seed=1, size=64, **options)
        stream.position = position
        return next(iter(stream))["image"][:, :1]

    for position, width in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        expected, _ = phantom_slices(2, seed=1, index=position, size=64, width=width)
        assert torch.equal(draw(position, widening_batches=4), expected)
    assert torch.equal(draw(0), phantom_slices(2, seed=1, index=0, size=64)[0])


def test_stacks_hold_the_slices_of_another_stream_along_the_last_axis():
    first, second = phantom_stacks(2, 3, seed=5, size=64)
    assert first["image"].shape == second["label"].shape == (1, 64, 64, 3)
    images, _ = phantom_slices(3, seed=5, index=1, size=64)
    assert torch.equal(second["image"][..., 2], images[2])


@pytest.mark.parametrize("killed_at", [1, 3], ids=["before a checkpoint", "in the second epoch"])
def test_killed_and_resumed_run_ends_in_the_same_weights(killed_at, trained, tmp_path, monkeypatch):
    seen = []

    def stream_until_killed(count, **arguments):
        if arguments["seed"] == 0:  # the training's, not the validation's
            if arguments["index"] == killed_at and killed_at not in seen:
                seen.append(killed_at)
                raise KeyboardInterrupt
            seen.append(arguments["index"])
        return phantom_slices(count, **arguments)

    phantom_slices = phantom_stream.phantom_slices
    monkeypatch.setattr(phantom_stream, "phantom_slices", stream_until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    train(tmp_path, resume=True)
    begun = killed_at - killed_at % 2  # first batch of the interrupted epoch
    assert seen == [*range(killed_at + 1), *range(begun, 4)]
    assert is_same(last_weights(tmp_path), last_weights(trained))
    assert is_same(*(torch.load(path / "model.pt", weights_only=True) for path in (tmp_path, trained)))


def start(folder: Path, *more: str) -> subprocess.Popen:
    overrides = {**TINY, "ckpt_dir": folder, "output_dir": folder / "eval"}
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", *config("train"), *more]
    command += [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen(command, cwd=BUNDLE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.7])
def test_process_killed_at_any_moment_resumes_to_the_same_weights(delay, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0
    run = start(broken)
    while not (broken / "checkpoint_epoch=1.pt").is_file():
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    run.kill()
    run.wait()
    assert start(broken, "--resume", "True").wait() == 0
    assert is_same(last_weights(broken), last_weights(whole))


def test_training_records_what_it_took(trained):
    note = json.loads((trained / "training.json").read_text())
    assert (note["epochs"], note["steps"], note["images_seen"]) == (2, 4, 16)
    assert note["settings"]["seed"] == 0
    assert note["versions"]["components"] == components.__version__
    assert 0 < note["hours"] < 0.1


def test_commands_are_recorded_without_folders():
    given = "run training --ckpt_dir /somewhere --epochs 3 --output_dir=/elsewhere --start_checkpoint /there/model.pt"
    recorded = "python -m monai.bundle run training --epochs 3 --start_checkpoint model.pt"
    assert command_without_folders(given.split()) == recorded


def test_hours_go_on_in_a_resumed_run_only(trained, tmp_path):
    for name in ("checkpoint_epoch=1.pt", "model.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "training.json").write_text(json.dumps({"hours": 7, "hardware": ["another"], "commands": []}))
    train(tmp_path, resume=True)
    note = json.loads((tmp_path / "training.json").read_text())
    assert 7 < note["hours"] < 7.1
    assert note["hardware"][0] == "another"
    assert len(note["hardware"]) == 2
    train(tmp_path, epochs=1)
    assert json.loads((tmp_path / "training.json").read_text())["hours"] < 1


def test_exported_checkpoint_is_read_as_sams_own(trained, export_dir):
    path = str(export_dir / "vit_tiny.pth")
    state = torch.load(path, weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    parts = read_sam_checkpoint(path)
    assert all(parts.values())
    model = torch.load(trained / "model.pt", weights_only=True)
    encoder = SamEncoder("vit_tiny", path, 64)
    for key, value in encoder.image_encoder.state_dict().items():
        assert torch.equal(value, model[f"encoder.image_encoder.{key}"].half().float()), key
    head = ViTHead(4, path, token_noise=0)
    for key, value in head.state_dict().items():
        expected = model[f"head.heads.vit.{key}"]
        expected = expected.mean(0).expand_as(expected) if key == "tokens" else expected
        assert torch.equal(value, expected.half().float()), key


@pytest.mark.parametrize("name", HEADS)
def test_exported_head_is_a_model_on_the_exported_encoder(name, trained, export_dir):
    model = torch.load(trained / "model.pt", weights_only=True)
    state = torch.load(export_dir / f"{name}_head.pt", weights_only=True)
    assert {value.dtype for key, value in state.items() if key.startswith("head.")} == {torch.float16}
    encoder = SamEncoder("vit_tiny", str(export_dir / "vit_tiny.pth"), 64)
    network = PromptFreeSam(encoder, HEADS[name]())
    network.load_state_dict(state)
    for key, value in network.head.state_dict().items():
        assert torch.equal(value, model[f"head.heads.{name}.{key}"].half().float()), key
    with pytest.raises(RuntimeError, match="fingerprint"):
        PromptFreeSam(SamEncoder("vit_tiny", image_size=64), HEADS[name]()).load_state_dict(state)


def test_record_tells_the_files_their_scores_and_the_training(trained, export_dir):
    record = json.loads((export_dir / "record.json").read_text())
    weights = sorted(path.name for path in export_dir.iterdir() if path.name != "record.json")
    assert weights == sorted(record["sha256"]) == [*(f"{name}_head.pt" for name in sorted(HEADS)), "vit_tiny.pth"]
    for name, digest in record["sha256"].items():
        content = (export_dir / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert len(content) < 25_000_000
    assert record["training"] == json.loads((trained / "training.json").read_text())
    assert record["dice"].keys() == HEADS.keys()
    for scores in record["dice"].values():
        by_class = [scores[name] for name in ("RV", "Myo", "LV")]
        assert scores["mean"] == pytest.approx(sum(by_class) / 3, abs=1e-4)


def test_same_weights_export_to_the_same_bytes(trained, export_dir, tmp_path):
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(trained), "export_dir": str(tmp_path)}
    monai.bundle.run("exporting", config_file=config("train", "export"), **TINY, **folders)
    records = [json.loads((folder / "record.json").read_text()) for folder in (export_dir, tmp_path)]
    assert records[0] == records[1]


def test_exporting_without_a_trained_model_says_what_to_do(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(tmp_path), "export_dir": str(tmp_path / "export")}
    with pytest.raises(RuntimeError) as error:
        monai.bundle.run("exporting", config_file=config("train", "export"), **TINY, **folders)
    assert "train first, or say where" in messages_of(error.value)


def test_encoder_under_one_head_then_all_heads_on_it_frozen(tmp_path):
    folders = {"bundle_root": str(BUNDLE), "output_dir": str(tmp_path / "eval"), "export_dir": str(tmp_path / "export")}
    small = {**TINY, "model_type": "phantom_unet", **folders}
    for stage in ("linear", "heads"):
        stage_folder = {"ckpt_dir": str(tmp_path / stage)}
        if stage == "heads":
            stage_folder["sam_checkpoint"] = str(tmp_path / "export/phantom_unet.pth")
        only_training = {key: value for key, value in small.items() if key != "export_dir"}
        monai.bundle.run("training", config_file=config("train", stage), **only_training, **stage_folder)
        monai.bundle.run("exporting", config_file=config("train", stage, "export"), **small, **stage_folder)
        parts = read_sam_checkpoint(str(tmp_path / "export/phantom_unet.pth"))
        if stage == "linear":
            encoder, decoder = parts["image_encoder"], parts["mask_decoder"]
    assert is_same(parts["image_encoder"], encoder)
    assert not is_same(parts["mask_decoder"], decoder)
    assert {path.name for path in (tmp_path / "export").glob("*.pt")} == {f"{name}_head.pt" for name in HEADS}
    record = json.loads((tmp_path / "export/record.json").read_text())
    assert record["training"]["encoder"] == json.loads((tmp_path / "linear/training.json").read_text())
    assert not any("image_encoder" in key for key in torch.load(tmp_path / "heads/model.pt", weights_only=True))


def test_missing_pretrained_file_is_an_error_that_lists_the_others():
    with pytest.raises(FileNotFoundError, match=r"no pretrained file 'vit_huge\.pth'.*bundles/phantom_encoder"):
        pretrained_file("vit_huge.pth")


@pytest.mark.parametrize("names", [("train",), ("train", "export")], ids=["train", "export"])
def test_workflow_has_every_property(names, trained):
    folders = {"bundle_root": str(BUNDLE), "ckpt_dir": str(trained), "export_dir": str(trained / "export")}
    folders = {key: folders[key] for key in ("bundle_root", "ckpt_dir", "export_dir")[: len(names) + 1]}
    workflow = ConfigWorkflow(config(*names), workflow_type="train", logging_file=False, **TINY, **folders)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_readme_explains_every_knob_with_its_default():
    assert_readme_explains_knobs(BUNDLE, "train", "export", "clicks", except_for=("dataset_dir", "pred_keys"))


def test_metadata_follow_the_schema_and_tell_the_network(metadata_schema, tmp_path):
    local = tmp_path / "schema.json"
    local.write_bytes(Path(metadata_schema).read_bytes())
    verify_metadata(meta_file=config("metadata")[0], filepath=str(local))
    files = {"config_file": config("train")[0], "meta_file": config("metadata")[0]}
    verify_net_in_out(net_id="network_def", device="cpu", **files)
