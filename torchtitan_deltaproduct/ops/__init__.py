"""The gated DeltaProduct operator: one public function, its backends behind one custom op.

    from torchtitan_deltaproduct.ops import gated_delta_product
    o, state = gated_delta_product(q, k, v, g, beta, num_householder=2, output_final_state=True)
"""

from torchtitan_deltaproduct.ops.interface import gated_delta_product
from torchtitan_deltaproduct.ops.recurrent import recurrent_step

__all__ = ["gated_delta_product", "recurrent_step"]
