"""In which precision embeddings and their gradients travel between ranks."""

from typing import Any

import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

from torchdlrm.config import TrainConfig


def communication_codecs(config: TrainConfig, device: torch.device) -> dict[str, Any] | None:
    """What TorchRec's sharder needs to send pooled embeddings as float16 and their gradients as bfloat16.

    These are the precisions of TorchRec's own example (golden_training): activations are small and want mantissa,
    gradients want range. TorchRec has no bfloat16 for gloo, so between CPUs gradients are float16 too and the smallest
    are lost: there it is for trials, and nothing that `auto` would choose.

    Args:
        config: of the training; `auto` takes float16 between GPUs.
        device: where this rank computes.

    Returns:
        The registry, or None where everything travels as it is.
    """
    precision = config.communication
    if precision == "auto":
        precision = "float16" if device.type == "cuda" else "float32"
    if precision == "float32":
        return None
    backward = CommType.BF16 if device.type == "cuda" else CommType.FP16
    registry: dict[str, Any] | None = get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=CommType.FP16, backward_precision=backward), device=device
    )
    return registry


def allow_tf32(config: TrainConfig, device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, with ten bits of mantissa, if the config wants it."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
