"""siglip-kernel: SigLIP loss that stores a chunk of the N x N matrix, in Triton around cuBLAS products.

``fused_siglip_loss`` takes the logarithm of the scale and divides the sum by N, as SigLIP does. Backend
``chunked_bf16`` is its own choice for bf16 and fp16, and multiplies in the dtype of the inputs; it is asked for by name
because the choice for fp32 would be a kernel that multiplies in TF32. The gradients are made in the forward pass.
"""

PACKAGE = "siglip-kernel"
DEVICES = ("cuda",)


def sigmoid():
    from siglip_kernel import fused_siglip_loss

    def variant(problem):
        log_scale = problem.scale.log()
        return fused_siglip_loss(problem.x, problem.y, log_scale, problem.bias, backend="chunked_bf16")

    return variant


VARIANTS = {"sigmoid": sigmoid}
