"""What the C library keeps of freed memory is given back where a step needs most, and only there."""

import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from aquila_sft import heap


class Library:
    """Stands for glibc: so much is free and kept; counts what it is asked to give back."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes, self.trims = free_bytes, []

    def mallinfo2(self):
        return heap._Mallinfo2(fordblks=self.free_bytes)

    def malloc_trim(self, pad: int) -> int:
        self.trims.append(pad)
        return 1


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tokenizer")).train()


def losses(model) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    return model(input_ids=ids, labels=ids).loss


def test_a_forward_and_a_backward_trim_once_each_and_change_no_gradient(model, monkeypatch):
    losses(model).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    library = Library(heap.MIN_FREE_BYTES)
    monkeypatch.setattr(heap, "libc", lambda: library)
    heap.install(model)
    loss = losses(model)
    assert len(library.trims) == 1
    loss.backward()
    assert len(library.trims) == 2
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))


def test_small_holes_and_evaluation_are_left_alone(model, monkeypatch):
    library = Library(heap.MIN_FREE_BYTES - 1)
    monkeypatch.setattr(heap, "libc", lambda: library)
    heap.install(model)
    losses(model).backward()
    library.free_bytes = 10**10
    with torch.no_grad():
        losses(model)
    assert not library.trims


def test_an_adapter_has_no_gradient_of_the_embedding_to_make_room_for(model, monkeypatch):
    library = Library(10**10)
    monkeypatch.setattr(heap, "libc", lambda: library)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    heap.install(adapted)
    losses(adapted).backward()
    assert len(library.trims) == 1


@pytest.mark.skipif(heap.libc() is None, reason="no glibc of 2.33 or newer")
def test_the_system_gets_back_what_was_freed_between_what_is_in_use():
    """In a process of its own: 600 pieces of 1 MB, every other one freed, are holes until they are trimmed."""
    script = """
        import ctypes
        from aquila_sft import heap
        import torch
        library = heap.libc()
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: where glibc's own goes after the first large piece is freed
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        pieces = [torch.ones(2**18) for _ in range(600)]
        del pieces[::2]
        before, free = resident(), library.mallinfo2().fordblks
        library.malloc_trim(0)
        print(free, before - resident())
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    free, given_back = map(int, ran.stdout.split())
    assert free > 300e6 and given_back > 0.9 * 300 * 2**20
