"""Loss and gradients of a swapped model in one of several processes that DDP averages over.

python swap_worker.py <base folder> <rank> <processes> <file to meet at> <out.pt>
"""

import sys

import triton_interpreter


def batch() -> dict:
    """Two rows of two packed conversations each; a third of the positions predict nothing."""
    import torch

    from aquila_sft import swap

    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 300, (2, 12), generator=generator)
    ids = labels.clone()
    labels[:, ::3] = -100
    positions = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "targets": swap.targets_of(labels)}


def main(base: str, rank: str, world: str, meeting: str, out: str) -> None:
    triton_interpreter.install()
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    from aquila_sft import swap

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
    net = AutoModelForCausalLM.from_pretrained(base)
    swap.install(net, "triton")
    share = {name: t.chunk(int(world))[int(rank)] for name, t in batch().items()}
    wrapped = DistributedDataParallel(net)
    loss = wrapped(**share).loss
    (loss * int(world)).backward()
    dist.all_reduce(loss.detach_())
    if rank == "0":
        torch.save({"loss": loss} | {name: p.grad for name, p in net.named_parameters()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
