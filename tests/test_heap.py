"""What the C library keeps of freed memory is given back where a step needs most, and only there."""

import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from aquila_sft import heap

needs_glibc = pytest.mark.skipif(heap.libc() is None, reason="no glibc of 2.33 or newer")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "tokenizer")).train()


@pytest.fixture
def trims(monkeypatch) -> list:
    """Every trim from now on; all holes are worth one."""
    made = []
    monkeypatch.setattr(heap, "MIN_BYTES", -(2**60))
    monkeypatch.setattr(heap.Heap, "trim", lambda self: made.append(setattr(self, "without_holes", 0)))
    return made


def losses(model) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    return model(input_ids=ids, labels=ids).loss


@needs_glibc
def test_a_forward_and_a_backward_trim_once_each_and_change_no_gradient(model, trims):
    losses(model).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    heap.install(model)
    trims.clear()  # the one before the first step
    loss = losses(model)
    assert len(trims) == 1
    loss.backward()
    assert len(trims) == 2
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))
    with torch.no_grad():
        losses(model)
    assert len(trims) == 2  # an evaluation keeps nothing


@needs_glibc
def test_an_adapter_has_no_gradient_of_the_embedding_to_make_room_for(model, trims):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    heap.install(adapted)
    trims.clear()
    losses(adapted).backward()
    assert len(trims) == 1


def test_without_such_a_library_nothing_is_changed(model, monkeypatch):
    monkeypatch.setattr(heap, "libc", lambda: None)
    heap.install(model)
    assert not model.base_model._forward_hooks and not model.get_input_embeddings()._forward_hooks


@needs_glibc
def test_holes_are_told_trimmed_where_they_are_large_and_not_told_twice():
    """In a process of its own: pieces of 1 MB, of which every other one is freed, are holes until they are trimmed."""
    script = """
        from aquila_sft import heap
        import torch
        library = heap.libc()
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: where glibc's own goes after the first large piece is freed
        mine = heap.Heap(library)
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        pieces = [torch.ones(2**18) for _ in range(600)]
        in_use = mine.unused_bytes() - mine.without_holes
        del pieces[400::2]
        small, before = mine.unused_bytes() - mine.without_holes, resident()
        mine.trim_if_it_pays()
        left_alone = before - resident()
        del pieces[:400:2]
        large, before = mine.unused_bytes() - mine.without_holes, resident()
        mine.trim_if_it_pays()
        print(in_use, small, left_alone, large, before - resident(), mine.unused_bytes() - mine.without_holes)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    in_use, small, left_alone, large, given_back, again = (int(n) / 2**20 for n in ran.stdout.split())
    assert abs(in_use) < 20 and abs(small - 100) < 20 and left_alone < 5
    assert abs(large - 300) < 20 and abs(given_back - 300) < 20 and abs(again) < 20
