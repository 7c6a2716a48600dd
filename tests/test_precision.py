"""What `auto` chooses: from times that are given, and from one real measurement."""

import importlib.util
import logging

import pytest
import torch


def fresh(*, native=True, share=None):
    """Import the module anew, since this process has chosen already; `share` is bf16's time if fp32's is 1."""
    spec = importlib.util.find_spec("components.base.precision")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.has_native_bf16 = lambda _device_type: native
    module.measured = []

    def seconds(_work, precision):
        module.measured.append(precision)
        return 1.0 if precision == "fp32" else share

    if share is not None:
        module._seconds = seconds
    return module


@pytest.mark.parametrize(("share", "chosen"), [(0.3, "bf16"), (0.94, "bf16"), (0.96, "fp32"), (2.0, "fp32")])
def test_auto_takes_bf16_only_where_the_cpu_is_clearly_faster_with_it(share, chosen, caplog):
    caplog.set_level(logging.INFO)
    module = fresh(share=share)
    for _ in range(2):
        with module.autocast_to("auto", "cpu"):
            assert torch.is_autocast_enabled("cpu") == (chosen == "bf16")
    assert len(module.measured) == 2 * 2 * 6  # one measurement: works, precisions, rounds
    assert caplog.text.count(f"precision auto on this CPU: {chosen}, since bf16 takes {share:.2f} of") == 1


def test_the_shortest_time_of_each_precision_counts_but_not_that_of_the_first_round():
    module = fresh()
    times = {"fp32": iter(2 * [0.1, 2.0, 9.0, 9.0, 1.0, 9.0]), "bf16": iter(2 * [9.0, 0.8, 3.0, 4.0, 5.0, 6.0])}
    module._seconds = lambda _work, precision: next(times[precision])
    assert module._bf16_share() == pytest.approx(0.8)


@pytest.mark.parametrize(("device_type", "native"), [("cpu", False), ("cuda", False), ("cuda", True)])
def test_gpus_and_cpus_without_the_instructions_are_not_measured(device_type, native):
    module = fresh(native=native, share=0.1)
    assert module.auto_is_bf16(device_type) == native
    assert not module.measured


def test_measurement_changes_neither_random_numbers_nor_the_precision_around_it():
    module = fresh()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module._bf16_share() > 0
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.rand(3), expected)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
