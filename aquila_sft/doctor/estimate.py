"""What a run will take: memory by part, and disk; arithmetic alone, from the architecture and the portions.

    Shape, Portion -> memory() -> parts and peak; disk() -> bytes

A step has two moments that can be the fullest. When the loss has been computed, everything that the forward pass kept
is there, and the loss's own gradients. When the backward pass ends, activations are gone and all gradients are there.
In between activations go as gradients come, both layer by layer, so that nothing is larger than at one of the ends.

N tokens of a micro-batch, T of them in a row, H hidden size, A heads x head size, K key-value heads x head size,
F intermediate size, V vocabulary, r rank of an adapter. Sizes are in numbers of four bytes where nothing else is said.
"""

import dataclasses
import os

from aquila_sft import heap
from aquila_sft.config.model import Lora, Model

# The loss in plain torch (aquila_kernels/linear_cross_entropy_torch.py) and in Triton: memory for logits at once.
LOGITS_BYTES = {"cpu": 320 * 2**20, "cuda": 2 * 2**30, "mps": 2**30}


# On a CPU tensors below 32 MiB come from glibc's heap, where what is freed between two that stay leaves a hole that
# hardly anything of its size fits again, because of the alignment. Measured beyond what the tensors themselves take: 11
# to 37 % with full weights, 42 to 50 % with adapters, which free three results for each matrix, over 11M to 194M
# parameters, with and without checkpointing, in fp32 and bf16. With MALLOC_MMAP_THRESHOLD_=1048576 in the environment
# the system gives and takes each large tensor alone: one of 42 % became 1 %, for some more time. With checkpointing
# holes of more than heap.MIN_BYTES are trimmed, where glibc can: of 194M parameters 5 to 8 % were left, and 20 % with
# an adapter, which was measured trimmed without checkpointing.
HOLES = {"full": 0.25, "adapter": 0.45}
TRIMMED_HOLES = {"full": 0.08, "adapter": 0.2}
NO_HOLES = "MALLOC_MMAP_THRESHOLD_"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What counts of an architecture. Llama and Mistral have the same."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int

    @classmethod
    def of_settings(cls, model: Model, entries: int | None) -> "Shape":
        """`entries` of the tokenizer stand in for model.vocab_size=null."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: getattr(model, name) for name in names} | {"vocab_size": model.vocab_size or entries})

    @classmethod
    def of_config(cls, config: dict) -> "Shape":
        """A model folder's config.json."""
        heads = config["num_attention_heads"]
        given = {
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
        }
        return cls(**{f.name: given.get(f.name, config.get(f.name)) for f in dataclasses.fields(cls)})

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        h, a, k, f = self.hidden_size, self.attention, self.num_key_value_heads * self.head_dim, self.intermediate_size
        return {
            "q_proj": (h, a),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (a, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @property
    def attention(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Matrices and two norms a layer, the last norm, embedding and head."""
        layer = sum(n * m for n, m in self.linears().values()) + 2 * self.hidden_size
        return (
            self.num_hidden_layers * layer + self.hidden_size + self.embedding * (1 if self.tie_word_embeddings else 2)
        )

    def adapter_parameters(self, lora: Lora) -> int:
        """A [r, in] and B [out, r] for each matrix that has an adapter."""
        return self.num_hidden_layers * sum(lora.r * (n + m) for n, m in self.adapted(lora))

    def adapted(self, lora: Lora) -> list[tuple[int, int]]:
        every = lora.targets == ["all-linear"]
        wanted = {target.rsplit(".", 1)[-1] for target in lora.targets}
        return [sizes for name, sizes in self.linears().items() if every or name in wanted]


@dataclasses.dataclass(frozen=True)
class Portion:
    """How a step is computed on one device."""

    rows: int  # of a micro-batch
    length: int
    accumulation: int  # micro-batches of a process in a step
    processes: int
    device: str  # cpu, cuda, mps
    is_bf16: bool
    activation_checkpointing: bool
    products_in_bf16: bool = True  # False: a CPU that computes the products of the loss in fp32 (is_bf16 or not)
    trains_on_after_saving: bool = False  # there are checkpoints before the last step's

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def kept_in_layer(shape: Shape, portion: Portion, lora: Lora | None) -> int:
    """Bytes that the forward pass of one layer keeps for its backward pass.

    Each of the two norms keeps its input x, the normalised x / rms (what its weight multiplies) and one number a token.
    Attention keeps q, k, v, once the rotary embedding turned them and the key-value heads were repeated to as many as
    there are query heads, its output, and the logarithm of its sums, one a head. sdpa turns the packed rows' mask into
    numbers in each layer: T a token. The MLP keeps gate, silu(gate), up and their product. A matrix keeps its input,
    which q, k, v share, as gate and up do; that of o_proj is the attention's output, that of down_proj the product.

        fp32   x 2H, normalised 2H, inputs 2H; q, k, v, output 4A; mask T; sums; MLP 4F
        bf16   norms stay fp32: 4H x 4 bytes; q, k, v, gate, up cast the input for themselves: 5H; the rest halves

    A frozen matrix or norm weight keeps nothing for its own gradient: normalised, inputs and product fall away. An
    adapter keeps what it multiplies: its input behind the dropout, the dropout's mask of factors, and A x, r numbers.
    Without dropout its input is the matrix's own.
    """
    h, a, f = shape.hidden_size, shape.attention, shape.intermediate_size
    small = 4 * (shape.num_attention_heads + 2)  # the sums of attention, 1 / rms of two norms
    size = 2 if portion.is_bf16 else 4  # of what is computed in bf16
    attention = size * (4 * a + portion.length)
    if lora is None:
        norms = 4 * 4 * h + size * (5 * h if portion.is_bf16 else 2 * h)
        return portion.tokens * (norms + attention + size * 4 * f + small)
    adapted = shape.adapted(lora)
    norms, mlp, inputs = 4 * 2 * h, size * 3 * f, sum(n for n, _ in adapted)
    if lora.dropout:
        adapters = (4 + size) * inputs
    elif portion.is_bf16:
        adapters = size * inputs
    else:  # shared: by q, k, v; by gate and up; the attention's output is there already
        adapters = 4 * (2 * h + f)
    return portion.tokens * (norms + attention + mlp + adapters + size * len(adapted) * lora.r + small)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes: the most that each part takes, and the most that all take at one moment."""

    parts: dict[str, int]
    peak: int


def memory(shape: Shape, portion: Portion, lora: Lora | None, program: int) -> Memory:
    """Of a step from the second on, when the optimizer has its moments.

    program: what the process holds before there is a model (Python and its libraries; nothing on a GPU). heap: what the
    allocator of a CPU cannot give again.
    saving: the copy of weights (of an adapter its own) and moments that a thread writes while training goes on, kept
    for the next one; in host memory, so on a CPU alone, and not where the only checkpoint is the last.
    Not in it: DoRA, a GPU's context, files that are mapped (the system takes them back when it needs room), and an
    evaluation, which keeps no activations.
    """
    n, h = portion.tokens, shape.hidden_size
    trained = shape.adapter_parameters(lora) if lora else shape.parameters
    weights = 4 * (shape.parameters + (trained if lora else 0))
    moments, gradients = 8 * trained, 4 * trained  # AdamW keeps two numbers for each that is trained; all is fp32
    before = gradients if portion.accumulation > 1 else 0  # those of the micro-batches before this one
    buckets = gradients if portion.processes > 1 else 0  # DDP's, a copy that stays
    head = 0 if lora else 4 * shape.embedding  # the gradient of the head's matrix, which the loss makes in forward
    tied = head * shape.tie_word_embeddings
    layer = kept_in_layer(shape, portion, lora)
    # A checkpointed layer keeps its input, and is computed again when its turn comes in the backward pass.
    kept = shape.num_hidden_layers * (4 * n * h if portion.activation_checkpointing else layer)
    again = layer if portion.activation_checkpointing else 0
    # Autocast's copies of the matrices, which backward reads again.
    kept += 2 * (shape.parameters - (0 if shape.tie_word_embeddings else shape.embedding)) if portion.is_bf16 else 0
    # Beside the layers: the last norm's input and what it multiplied, its output, the rows of it that have a target,
    # and their gradient, as rows and in place.
    around = 4 * 6 * n * h
    # Of the logits some rows exist at once, of half of the tokens at most (linear_cross_entropy_torch.py).
    size = 2 if portion.is_bf16 and portion.products_in_bf16 else 4
    logits = min(LOGITS_BYTES[portion.device], size * shape.vocab_size * ((n + 1) // 2))
    mlp = 4 * n * (2 * h + 2 * shape.intermediate_size)  # gradients on their way through a layer
    moments_of_step = [  # gradients, activations, logits
        (buckets + before + head, kept + around, logits),  # the loss is computed, with its gradients
        # backward begins: elsewhere than on a CPU those gradients times the upstream one are new
        (buckets + before + (1 if portion.device == "cpu" else 2) * head, kept + around, 0),
        (buckets + before + head, kept + again + mlp, 0),  # the last layer's backward begins
        # backward ends: all gradients, and a tied matrix has two that are then added; before the last micro-batch's
        # are added to those before, three
        (buckets + gradients + tied * (2 if portion.accumulation > 1 else 1), layer, 0),
    ]
    standing = {"weights": weights, "optimizer": moments}
    most = dict(zip(("gradients", "activations", "logits"), map(max, zip(*moments_of_step, strict=True)), strict=True))
    copy = 12 * trained if portion.device == "cpu" and portion.trains_on_after_saving else 0
    tensors = sum(standing.values()) + max(map(sum, moments_of_step))
    holes = 0
    if portion.device == "cpu" and NO_HOLES not in os.environ:
        of_kind, trimmed_of_kind = (round(of["adapter" if lora else "full"] * tensors) for of in (HOLES, TRIMMED_HOLES))
        trims = portion.activation_checkpointing and heap.libc() is not None
        holes = min(of_kind, max(heap.MIN_BYTES, trimmed_of_kind)) if trims else of_kind
    parts = {"program": program} | standing | most | {"heap": holes, "saving": copy}
    return Memory(parts, program + tensors + holes + copy)


def disk(shape: Shape, lora: Lora | None, checkpoints: int, models: int = 0) -> tuple[int, int]:
    """Bytes of one checkpoint, and of the run: so many of them, one that is being written, the models that pretraining
    keeps on its way, and final/.

    A checkpoint is fp32 weights and AdamW's moments; that of an adapter holds the adapter's alone.
    """
    if lora is None:
        one, final = 12 * shape.parameters, 4 * shape.parameters
    else:
        adapter = shape.adapter_parameters(lora)
        one, final = 12 * adapter, 4 * (shape.parameters + adapter)
    return one, one * (checkpoints + 1) + 4 * shape.parameters * models + final
