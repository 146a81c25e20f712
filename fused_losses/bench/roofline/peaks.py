"""What GPUs can do at most, and what others' kernels move, with where each figure is from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Datasheet figures of the SXM boards, dense; L2 as its comment says. None was measured."""

    arch: str  # whose tiles it runs
    processors: int
    half: float  # FLOP/s of 16-bit products
    tf32: float
    fp32: float  # of products and of everything else, off the tensor cores
    dram: float  # bytes/s
    l2: float  # bytes/s between L2 and the processors
    l2_bytes: int


MB = 10**6
# L2 to processors: 5120 bytes a clock, which NVIDIA's A100 whitepaper gives; no datasheet gives it
# for the others, which are assumed to have it too. Times the boost clock: 1.41, 1.755, 1.965 GHz
PEAKS = {
    "A100": Peak("sm_80", 108, 312e12, 156e12, 19.5e12, 2.04e12, 5120 * 1.41e9, 40 * MB),
    "H100": Peak("sm_90", 132, 989e12, 495e12, 67e12, 3.35e12, 5120 * 1.755e9, 50 * MB),
    "H200": Peak("sm_90", 132, 989e12, 495e12, 67e12, 4.8e12, 5120 * 1.755e9, 50 * MB),
    "B200": Peak("sm_100", 148, 2250e12, 1100e12, 75e12, 7.7e12, 5120 * 1.965e9, 126 * MB),
}

# Seconds from a kernel's end to the next one's start on a stream that the host keeps full: 3.8 us a
# kernel of 2.9 (A. Gray, Getting Started with CUDA Graphs, NVIDIA 2019, on a V100)
GAP = 0.9e-6
# Of the host for a launch. Ours: the Python side of Triton's launcher, the driver's call left out,
# measured on one thread: 9 us (few arguments) to 16 (groups of them). PyTorch's operators: assumed
OWN_LAUNCH, TORCH_LAUNCH = 16e-6, 5e-6

# GB between L2 and the processors, and through DRAM, of kernels written elsewhere; their tiles were
# read from their code and compiled without a GPU, the bytes derived: shared/gpu_anchors.md
PEERS = {
    ("margin_softmax", "forward"): {
        "cut-cross-entropy": (12.3, 1.03),
        "Liger, CuTe (Hopper only)": (7.4, 1.03),
    },
    ("margin_softmax", "backward"): {
        "cut-cross-entropy, nothing filtered": (66.6, 4.1),
        "Liger, CuTe (Hopper only)": (36.0, 9.2),
    },
    ("info_nce", "forward"): {"Inf-CL": (68.7, 0.40), "memeff": (17.2, 0.07)},
    ("info_nce", "backward"): {
        "Inf-CL": (344.0, 1.08),
        "memeff, by tiles": (68.7, 0.47),
        "memeff, whole rows": (34.6, 0.27),
    },
    ("sigmoid", "backward"): {
        "siglip, fused (forward too)": (85.9, 0.20),
        "siglip v2 (forward too)": (34.6, 0.27),
    },
    # at D = 512 it moves 24.6: here at half of that
    ("topk", "forward"): {"flash_knn": (12.3, 0.52)},
    ("maxsim", "forward"): {"LIK": (0.30, 0.005)},
}
