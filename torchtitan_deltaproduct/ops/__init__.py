"""The gated DeltaProduct operator: one public function, its backends behind one custom op.

    from torchtitan_deltaproduct.ops import gated_delta_product
    o, state = gated_delta_product(q, k, v, g, beta, num_householder=2, output_final_state=True)

`recurrent.py` is the definition, `segment.py` the chunkwise algebra, `interface.py` chooses the backend.
"""

from torchtitan_deltaproduct.ops import custom_op, ranks, shards
from torchtitan_deltaproduct.ops.flops import flops_per_token
from torchtitan_deltaproduct.ops.interface import gated_delta_product
from torchtitan_deltaproduct.ops.ranks import SequenceRanks
from torchtitan_deltaproduct.ops.recurrent import recurrent_gated_delta_product, recurrent_step

SAVE_FOR_SELECTIVE_AC = {custom_op.FORWARD, shards.MAP, shards.OUTPUT, ranks.GATHER}
"""Ops whose outputs selective activation checkpointing should keep: o, what the backward needs, what ranks sent. Of
backend "triton" see `triton_backend.Geometry`, of "chunk" it is as many float32 as v has."""

__all__ = [
    "SAVE_FOR_SELECTIVE_AC",
    "SequenceRanks",
    "flops_per_token",
    "gated_delta_product",
    "recurrent_gated_delta_product",
    "recurrent_step",
]
