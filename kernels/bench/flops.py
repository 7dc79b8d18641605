"""How much arithmetic a training step needs, and how much a GPU can do: what MFU is made of.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) = FLOPs that the step needs / seconds / the GPU's peak.
"""

# Dense bf16 products with fp32 sums, 1e12 a second, by what torch calls the GPU; what is not here has no known peak.
# NVIDIA A100 data sheet: 312. H100 white paper ("NVIDIA H100 Tensor Core GPU Architecture", table of SXM5): 989.4.
# H200 SXM data sheet: 1,979 with sparsity, as the H100, so half of it. Their PCIe and NVL boards are slower: left out.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}


def of_step(config, tokens: int, targets: int, pairs: int) -> int:
    """FLOPs of forward and backward of a Llama- or Mistral-shaped model over one step.

        6 * N_layers * tokens + 6 * V * H * targets + 12 * layers * heads * head_dim * pairs

    6 N: two operations a weight forward, four backward; recomputation is not counted. N_layers: weights of the layers'
    matrices. The head counts where there is a target alone, since the loss needs no other logits; the embedding is a
    lookup. tokens: padding left out. pairs: (query, key) that one may see, the token itself among them: n (n + 1) / 2
    for a document of n tokens; two products of head_dim forward, four backward. Whoever computes more, as logits of
    what is not supervised or the masked half of the attention, gains no MFU by it.
    """
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    of_layer = 2 * hidden * (queries + config.num_key_value_heads * config.head_dim) + 3 * (
        hidden * config.intermediate_size
    )
    layers = config.num_hidden_layers
    return 6 * (layers * of_layer * tokens + config.vocab_size * hidden * targets) + 12 * layers * queries * pairs


def mfu(flops: float, seconds: float, device: str) -> float | None:
    """None for a GPU whose peak is not known here."""
    peak = PEAK_TFLOPS.get(device)
    return None if peak is None else flops / seconds / (peak * 1e12)
