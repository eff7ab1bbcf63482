"""One command for a GPU: checks the operator against float64, then times it; `benchmarks.training` times the model.

    python -m benchmarks.gpu_smoke                      everything (minutes, most of them Triton tuning)
    python -m benchmarks.gpu_smoke --only errors        or: growth, times

Errors are ||x - ref|| / ||ref|| against the float64 recurrence on the same bf16 inputs. Times are medians of CUDA-event
measurements.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from torchtitan_deltaproduct.ops import gated_delta_product

DEVICE = "cuda"


def inputs(n: int, gated: bool, B: int, T: int, H: int, K: int, dtype=torch.bfloat16, seed: int = 0) -> dict:
    """Random operands in `dtype`; beta and g in float32, beta in (0, 2)."""
    gen = torch.Generator(DEVICE).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, device=DEVICE, generator=gen)  # noqa: E731
    return {
        "q": draw(B, T, H, K).to(dtype),
        "k": draw(B, T * n, H, K).to(dtype),
        "v": draw(B, T * n, H, K).to(dtype),
        "g": -0.1 * draw(B, T, H).abs() if gated else None,
        "beta": 2 * draw(B, T * n, H).sigmoid(),
    }


def run_op(tensors: dict, n: int, backend: str, upstream=None, op=gated_delta_product, **options):
    """Output and gradients (None without `upstream`) of one backend."""
    with_grad = upstream is not None
    leaves = {k: None if x is None else x.detach().requires_grad_(with_grad) for k, x in tensors.items()}
    o, _ = op(**leaves, num_householder=n, use_qk_l2norm=True, backend=backend, **options)
    if upstream is None:
        return o, None
    o.backward(upstream.to(o.dtype))
    return o.detach(), {k: x.grad for k, x in leaves.items() if x is not None}


def error(x: torch.Tensor, ref: torch.Tensor) -> float:
    return float((x.double() - ref).norm() / ref.norm())


def check_op(table: Table, householders: list[int]) -> None:
    """Rows of relative errors of `fla` and `chunk` against the float64 recurrence."""
    for n in householders:
        for gated in (False, True):
            for packed in (False, True):
                tensors = inputs(n, gated, 1, 509, 4, 128, seed=n)
                cu = torch.tensor([0, 1, 64, 200, 200, 509], device=DEVICE, dtype=torch.int32) if packed else None
                double = {k: None if x is None else x.double() for k, x in tensors.items()}
                up = torch.randn(1, 509, 4, 128, device=DEVICE, dtype=torch.float64)
                ref, ref_grads = run_op(double, n, "recurrent", up, cu_seqlens=cu)
                for backend in ("fla", "chunk"):
                    try:
                        o, grads = run_op(tensors, n, backend, up, cu_seqlens=cu)
                    except Exception as exc:  # the table tells which combination fails, and goes on
                        row = [str(exc).splitlines()[0][:60]] + [""] * 5
                    else:
                        row = [f"{error(o, ref):.1e}"]
                        row += [f"{error(grads[k], ref_grads[k]):.1e}" if k in grads else "-" for k in "qkv"]
                        row += [f"{error(grads[k], ref_grads[k]):.1e}" if k in grads else "-" for k in ("beta", "g")]
                    table.add_row(str(n), "yes" if gated else "no", "yes" if packed else "no", backend, *row)


def repeated_keys(table: Table) -> None:
    """Norm of the state after 4,096 tokens of one key with beta at 2, over its norm after 64."""
    for n in (1, 2):
        for backend in ("fla", "chunk"):
            norms = []
            for T in (64, 4096):
                tensors = inputs(n, False, 1, T, 4, 128)
                tensors["k"] = tensors["k"][:, :1].expand(1, T * n, 4, 128).contiguous()
                tensors["beta"] = torch.full((1, T * n, 4), 2.0, device=DEVICE)
                tensors["v"][:, n:] = 0
                _, state = gated_delta_product(
                    **tensors, num_householder=n, use_qk_l2norm=True, backend=backend, output_final_state=True
                )
                norms.append(state.norm().item())
            table.add_row(str(n), backend, f"{norms[1] / norms[0]:.3g}")


def milliseconds(fn) -> float:
    from triton.testing import do_bench

    return do_bench(fn, warmup=50, rep=200, return_mode="median")


def time_op(table: Table, householders: list[int]) -> None:
    """fla called directly, beside our op (compiled, as in a block) over fla and over chunk."""
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    compiled = torch.compile(gated_delta_product, fullgraph=True)
    B, T, H = 8, 4096, 8
    for n in householders:
        tensors = inputs(n, False, B, T, H, 128)
        up = torch.randn(B, T, H, 128, device=DEVICE, dtype=torch.bfloat16)

        def direct(backward: bool, tensors=tensors, n=n, up=up):
            leaves = {k: x.detach().requires_grad_(backward) for k, x in tensors.items() if x is not None}
            o, _ = chunk_gated_delta_product(
                **leaves, g=None, num_householder=n, use_qk_l2norm_in_kernel=True, output_final_state=False
            )
            if backward:
                o.backward(up)

        def ours(backend: str, backward: bool, tensors=tensors, n=n, up=up):
            run_op(tensors, n, backend, up if backward else None, op=compiled)

        for backward in (False, True):
            base = milliseconds(lambda: direct(backward))  # noqa: B023
            row = [f"{base:.2f}"]
            for backend in ("fla", "chunk"):
                ms = milliseconds(lambda: ours(backend, backward))  # noqa: B023
                row.append(f"{ms:.2f} ({base / ms:.2f}x)")
            table.add_row(str(n), f"{B} x {T}", str(H), "fwd+bwd" if backward else "fwd", *row)


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["errors", "growth", "times"])
    parser.add_argument("--householders", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    console = Console(width=150)
    import triton

    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    if "errors" in args.only:
        columns = ("n", "gated", "packed", "backend", "o", "dq", "dk", "dv", "dbeta", "dg")
        errors = new_table("relative error against float64, T = 509, H = 4, K = V = 128", *columns)
        check_op(errors, args.householders)
        console.print(errors)
    if "growth" in args.only:
        growth = new_table("one key, beta = 2: state norm after 4,096 tokens / after 64", "n", "backend", "growth")
        repeated_keys(growth)
        console.print(growth)
    if "times" in args.only:
        columns = ("n", "B x T", "H", "pass", "fla direct", "ours over fla", "ours over chunk")
        times = new_table("milliseconds (speed relative to fla), K = V = 128, bf16", *columns)
        time_op(times, args.householders)
        console.print(times)


if __name__ == "__main__":
    main()
