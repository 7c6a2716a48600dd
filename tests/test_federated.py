"""A federated round by MONAI's client on each bundle."""

from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

from components.phantom.dataset import write_phantom_dataset


@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param("autosam_acdc", marks=pytest.mark.slow),
        pytest.param("cnnhead_acdc", marks=pytest.mark.slow),
        "linearhead_acdc",
    ],
)
def test_client_trains_and_evaluates_what_the_server_sends(bundle, tmp_path):
    data = write_phantom_dataset(str(tmp_path / "phantoms"), patients=4, size_hw_d=(64, 48, 2))
    knobs = {
        "dataset_dir": data,
        "ckpt_dir": str(tmp_path / "models"),
        "output_dir": str(tmp_path / "eval"),
        "cache_dir": str(tmp_path / "embeddings"),
        "model_type": "vit_tiny",
        "sam_checkpoint": "$None",
        "image_size": 64,
        "views": 1,
    }
    client = MonaiAlgo(
        str(REPOSITORY / "bundles" / bundle),
        local_epochs=1,
        send_weight_diff=True,
        config_evaluate_filename=["configs/train.json", "configs/evaluate.json"],
        train_kwargs=dict(knobs),
        eval_kwargs=dict(knobs),
        best_model_filepath=str(tmp_path / "models/model.pt"),
    )
    client.initialize({ExtraItems.CLIENT_NAME: "site"})
    server = {key: value.clone() for key, value in client.trainer.network.state_dict().items()}
    assert len(server) < 200  # the head and the encoder's fingerprint, not the encoder

    client.train(ExchangeObject(weights=server, weight_type=WeightType.WEIGHTS))
    sent = client.get_weights()
    assert sent.weight_type == WeightType.WEIGHT_DIFF
    assert sent.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] > 0
    moved = {key: server[key] + change for key, change in sent.weights.items()}
    now = client.trainer.network.state_dict()
    assert moved.keys() == now.keys()
    assert all(torch.allclose(value.float(), now[key].float(), atol=1e-5) for key, value in moved.items())
    assert any(not torch.equal(value, server[key]) for key, value in moved.items())

    scores = client.evaluate(ExchangeObject(weights=moved, weight_type=WeightType.WEIGHTS)).metrics
    assert 0 <= scores["val_mean_dice"] <= 1
    assert (tmp_path / "eval/metrics.csv").is_file()
    best = client.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
    assert best.weights.keys() == server.keys()
    client.train(ExchangeObject(weights=moved, weight_type=WeightType.WEIGHTS))  # the next round
    assert client.trainer.state.epoch == 2
    client.finalize()
    assert Path(tmp_path / "models/checkpoint_epoch=2.pt").is_file()
