"""Memory that was freed and that the C library keeps, given back to the system twice in every forward and backward.

    decoder ends   -> trim: what its layers needed for a moment; the loss comes next, with activations at their most
    decoder begins -> trim, on the way back: all activations; the embedding's gradient comes next, as large as it

glibc keeps what is freed in pieces of less than 32 MB, as holes between what is still in use. Of a model of 193.7M they
were 1 to 2 GB, just when most is in use; recipes/RESULTS.md has what trimming costs and saves. Models whose holes are
small are left alone: there it would only cost the time to fill the pages again.
"""

import ctypes
import sys

MIN_FREE_BYTES = 2**28  # below it the holes are no part of any machine's memory that matters


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2; `fordblks` is what is free and kept."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def libc() -> ctypes.CDLL | None:
    """The C library of this process, where it can be asked what it keeps (glibc from 2.33 on)."""
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None)
    if not (hasattr(found, "mallinfo2") and hasattr(found, "malloc_trim")):
        return None
    found.mallinfo2.restype = _Mallinfo2
    return found


def install(model) -> None:
    """On a model that is trained on a CPU, PEFT's or plain. Without a glibc that can do it nothing is changed."""
    import torch

    from aquila_sft.swap import base_of

    library, base = libc(), base_of(model)
    if library is None:
        return

    def trim() -> None:
        if library.mallinfo2().fordblks >= MIN_FREE_BYTES:
            library.malloc_trim(0)

    def decoder_ends(*_) -> None:
        if torch.is_grad_enabled():
            trim()

    def decoder_begins(_module, _given, embedded) -> None:
        if embedded.requires_grad:
            embedded.register_hook(lambda _: trim())

    base.base_model.register_forward_hook(decoder_ends)
    base.get_input_embeddings().register_forward_hook(decoder_begins)
