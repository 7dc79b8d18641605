"""Which ids of the chat template the base has never been trained on, told from its embedding alone.

    embedding [V, H] -> rows that no training can have touched -> is the row of <|im_start|> one of them?

Nothing in a model's folder says which tokens its training has seen. Its embedding does, because it holds rows that no
text can have trained: thirteen bytes (C0, C1, F5 … FF) stand in every byte-level vocabulary and occur in no UTF-8. They
are the control group. A row that was never an input has its first random value and whatever drift all such rows share:
weight decay shrinks them alike, and where the head is tied, the softmax pushes each of them in the same direction. So
untouched rows lie around one centre, at one distance (the noise they began with, equal in all of them up to some
percent, in hundreds of dimensions), and trained rows lie farther out by what they have learnt.

    a row is untouched    its distance to the centre of the control group is that of the group's own members
    the test can tell     the ids that the conversations are made of lie clearly farther out; where they do not (fresh
                          weights, a base of a few steps), nothing is said

Compared are distances, not norms: in a tied model the drift makes untouched rows the longest of all (1.9 against a
median of 1.3 after the pretraining of scale=mini), in an untied one they may be the shortest. That under-trained tokens
are told by their embedding, with known unused ones as the reference, is Land and Bartolo's finding ("Fishing for
Magikarp", arXiv 2405.05417).

Rows that were put there after the training have no such drift, and are known by how they are made: rows of zeros,
copies of one row, the mean of all rows (as transformers and most scripts grow an embedding), or no row at all.
"""

import dataclasses
from pathlib import Path

import numpy as np

NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
MARGIN = 1.1  # beyond the farthest member of the control group, each measured from the centre of the others
CLEARLY = 1.25  # times the farthest member: where half of the tokens of the conversations have to lie, at the least
NEAR_THE_MEAN = 0.05  # of the median distance to the mean; grown rows are drawn within 1e-4 of it or so


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`untrained`: id -> how that shows. `undecided`: why the control group tells nothing, None where it does."""

    untrained: dict[int, str]
    undecided: str | None


def judge(rows: np.ndarray, ids: list[int], control: list[int], used: np.ndarray) -> Verdict:
    """rows: the embedding. ids: of the template. control: never trained. used: ids as they occur in conversations."""
    found: dict[int, str] = {}
    mean = rows.mean(0)
    to_mean = np.linalg.norm(rows - mean, axis=1)
    for i in ids:
        if i >= len(rows):
            found[i] = f"the embedding has {len(rows):,} rows"
        elif not rows[i].any():
            found[i] = "its row is zero"
        elif len(same := [j for j in np.flatnonzero(to_mean == to_mean[i]) if j != i and (rows[j] == rows[i]).all()]):
            found[i] = f"its row is a copy of that of id {same[0]}"
        elif to_mean[i] < NEAR_THE_MEAN * np.median(to_mean):
            found[i] = "its row is the mean of all rows"
    control, used = [i for i in control if i < len(rows)], used[used < len(rows)]
    if len(control) < 8 or not len(used):
        return Verdict(found, f"{len(control)} entries of the vocabulary are known to be unused, 8 are needed")
    group = rows[control]
    others = (group.sum(0) - group) / (len(group) - 1)  # the centre without the member that is measured
    farthest = float(np.linalg.norm(group - others, axis=1).max())
    centre = group.mean(0)
    if np.quantile(np.linalg.norm(rows[used] - centre, axis=1), 0.5) < CLEARLY * farthest:
        return Verdict(found, "ordinary tokens lie no farther out than unused ones, as in fresh weights")
    for i in ids:
        if i not in found and (distance := float(np.linalg.norm(rows[i] - centre))) <= MARGIN * farthest:
            found[i] = (
                f"its row lies {distance:.2f} from the centre of {len(control)} entries that no text can hold, their "
                f"own lie up to {farthest:.2f} from it"
            )
    return Verdict(found, None)


def not_finite(rows: np.ndarray) -> np.ndarray:
    """The ids whose rows hold NaN or infinity: no distance says anything of them, nor of others beside them."""
    return np.flatnonzero(~np.isfinite(rows).all(axis=1))


def control_ids(tokenizer) -> list[int]:
    """Ids of the bytes that no UTF-8 text has, as byte-level and SentencePiece vocabularies spell them."""
    from aquila_sft.tokenizer import byte_letters

    vocabulary, letters = tokenizer.get_vocab(), byte_letters()
    spelt = [(letters[byte], f"<0x{byte:02X}>") for byte in NEVER_IN_UTF8]
    return sorted(vocabulary[name] for names in spelt for name in names if name in vocabulary)


def embedding_of(folder: Path) -> np.ndarray | None:
    """The embedding of a model's folder, float32 [V, H], read without the rest; None under a name that is not known."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
                    return weights.get_tensor(name).float().numpy()
    return None
