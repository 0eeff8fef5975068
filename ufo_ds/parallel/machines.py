"""GPUs that a plan can be made for: published figures."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB as torch reports it; dense peak rates in TFLOP/s; links in GB/s in one direction, of one GPU."""

    memory: float
    bf16: float
    fp32: float
    inside: float  # to the GPUs of the same node, over NVLink
    between: float  # to other nodes
    share_of_peak: float  # that a ViT reaches in training

    def rate(self, precision: str) -> float:
        """FLOP/s that are reached."""
        return (self.fp32 if precision == "fp32" else self.bf16) * 1e12 * self.share_of_peak


# Memory, peak and NVLink (half of the published figure, which counts both directions) from NVIDIA's data sheets of
# H200, H100 SXM and A100 SXM. Between nodes one adapter a GPU, as in DGX H100 and H200 (400 Gbit/s) and DGX A100
# (200 Gbit/s). Share of peak: NVIDIA NeMo's ViT g/14 reaches 29% on 8 H100 and 44% on 8 A100.
GPUS = {
    "h200": Gpu(139.0, 989.0, 67.0, 450.0, 50.0, 0.29),
    "h100": Gpu(79.0, 989.0, 67.0, 450.0, 50.0, 0.29),
    "a100-80": Gpu(79.0, 312.0, 19.5, 300.0, 25.0, 0.44),
    "a100-40": Gpu(39.0, 312.0, 19.5, 300.0, 25.0, 0.44),
}

# Of a link's rate what collectives reach, and of the memory what a run can have: the rest is fragmentation. Beside it
# the CUDA context and NCCL's buffers. Assumptions, to be replaced by measurements of one's own.
SHARE_OF_LINK = 0.7
SHARE_OF_MEMORY = 0.95
CONTEXT_GIB = 2.0


def usable_bytes(gpu: Gpu) -> int:
    """Memory that a run's tensors can have."""
    return int((gpu.memory * SHARE_OF_MEMORY - CONTEXT_GIB) * GIB)
