"""Device choice, torchtitan's five bindings, peak FLOP/s."""

import torch
from torchtitan.components import metrics
from torchtitan.distributed import parallel_dims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import profiling, utils

from torchtitan_deltaproduct.titan import device


def test_the_longest_name_wins_and_the_unknown_is_unknown():
    assert device.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert device.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert device.peak_flops("NVIDIA H200") == 989e12
    assert device.peak_flops("NVIDIA H20") == 148e12
    assert device.peak_flops("AMD EPYC") == 0.0


def test_install_rebinds_every_module(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.select_device()[0] == "cpu"
    device.install("cpu", peak=1e12)
    assert {m.device_type for m in (utils, parallel_dims, dist_utils, metrics)} == {"cpu"}
    assert len({id(m.device_module) for m in (utils, dist_utils, metrics, profiling)}) == 1
    assert utils.get_peak_flops("NVIDIA H100") == 1e12
    device.install("cpu")
    assert utils.get_peak_flops("anything else") == 0.0


def test_the_cpu_module_measures_this_process():
    module = device.CpuModule()
    monitor_input = module.memory_stats()
    assert 50e6 < monitor_input["active_bytes.all.peak"] < module.get_device_properties().total_memory
    assert module.current_device() == 0 and module.get_device_name()
