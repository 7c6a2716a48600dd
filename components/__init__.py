"""Everything the bundles' JSON configs name: encoder, heads, network, data, metrics, checkpoints and reports.

Importing the package warms up torch's CPU mathematics once. In torch 2.13 (oneMKL 2024.2) the very first call of a
vectorised function (`sqrt`, `exp`, ...) in a process may run at reduced precision on one of its threads
(https://github.com/pytorch/pytorch/issues/188792): an error of 1e-3 in the first forward pass, gone in the second. One
call on a single element, which never leaves the calling thread, takes that first call out of every real computation.
"""

import torch

__version__ = "0.1.0"


def _warm_up_cpu_math() -> None:
    one = torch.ones(1)
    for function in (torch.sqrt, torch.rsqrt, torch.exp, torch.log, torch.sin, torch.cos, torch.tanh, torch.erf):
        function(one)


_warm_up_cpu_math()
