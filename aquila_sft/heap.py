"""Memory that was freed and that the C library keeps, given back to the system twice in every forward and backward.

    decoder ends   -> trim: what its layers needed for a moment; the loss comes next, with activations at their most
    decoder begins -> trim, on the way back: all activations; the embedding's gradient comes next, as large as it

glibc keeps what is freed in pieces of less than 32 MB, as holes between what is still in use. Of a model of 193.7M
they were 1 to 2 GB, just when most is in use; recipes/RESULTS.md has what trimming saves and costs. Pages that were
given back have to be filled again, which takes time: so this goes with activation checkpointing, which is that bargain
too, and small holes are left alone.
"""

import ctypes
import os
import sys

MIN_BYTES = 2**28  # of holes; fewer are no part of any machine's memory that matters


class Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2. In use are `uordblks`, and `hblkhd` of pieces that were mapped alone."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def libc() -> ctypes.CDLL | None:
    """The C library of this process, where it can say what is in use and give back the rest (glibc from 2.33 on)."""
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None)
    if not (hasattr(found, "mallinfo2") and hasattr(found, "malloc_trim")):
        return None
    found.mallinfo2.restype = Mallinfo2
    return found


class Heap:
    """This process's. Its holes are what is resident and not in use, beyond what was so after the last trim.

    glibc's own count of free bytes does not tell them: what was given back stays in it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.trim()

    def unused_bytes(self) -> int:
        """Resident and not given out by malloc: holes, and what others have mapped."""
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        info = self.library.mallinfo2()
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE") - info.uordblks - info.hblkhd

    def trim(self) -> None:
        self.library.malloc_trim(0)
        self.without_holes = self.unused_bytes()

    def trim_if_it_pays(self) -> None:
        if self.unused_bytes() - self.without_holes >= MIN_BYTES:
            self.trim()


def install(model) -> None:
    """On a model that is trained on a CPU, PEFT's or plain. Without a glibc that can do it nothing is changed."""
    import torch

    from aquila_sft.swap import base_of

    library, base = libc(), base_of(model)
    if library is None:
        return
    heap = Heap(library)

    def decoder_ends(*_) -> None:
        if torch.is_grad_enabled():
            heap.trim_if_it_pays()

    def decoder_begins(_module, _given, embedded) -> None:
        if embedded.requires_grad:
            embedded.register_hook(lambda _: heap.trim_if_it_pays())

    base.base_model.register_forward_hook(decoder_ends)
    base.get_input_embeddings().register_forward_hook(decoder_begins)
