"""`funcattn inspect --machine`: the kernels and operators that this machine has, and why not."""

import torch

from .. import kernels, native
from ..layers import dense_products
from ..quantization import tiles
from .terminal import shown

INSTRUCTIONS = {1: "AVX2", 2: "AVX-512"}  # as native.instructions counts them
SHAPE = (8, 512, 64)  # (H, T, D) of the request that is explained


def show() -> None:
    """Print the processor, devices, operators in C++, and attention kernels."""
    print("machine")
    print(f"  {'processor':<14} {shown(native.model_name())}")
    print(f"  {'threads':<14} {torch.get_num_threads()}")
    print(f"  {'torch':<14} {torch.__version__}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(
        f"  {'devices':<14} "
        f"{', '.join(['cpu', *(f'cuda:{i} ({name})' for i, name in enumerate(gpus))])}"
    )

    print("\noperators in C++")
    why_not = tiles.missing()
    if why_not:
        print(f"  none: {shown(why_not)}")
    else:
        origin = "of the installed wheel" if native.packaged() else "compiled on this machine"
        print(f"  {INSTRUCTIONS[native.instructions()]}, {origin}")
        print(f"  {dense_products.explain()}")

    for device in ["cpu", *(f"cuda:{i}" for i in range(len(gpus)))]:
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.zeros(SHAPE, dtype=dtype, device=device)
            name = str(dtype).removeprefix("torch.")
            print(f"\nattention of q, k, v {SHAPE} in {name} on {device}")
            for verdict in kernels.explain(q, q, q).verdicts:
                print(
                    f"  {'->' if verdict.chosen else '  '} {verdict.kernel:<16} "
                    f"{verdict.why_not or 'can run'}"
                )
