"""Which rows are worth training on: scores from their tokens, what repeats, and a budget shared out over groups.

Arrays in, arrays out: no files, no torch. Entropies are in nats. What a row gets here hangs on its own text alone, and
whatever is left open between rows is settled by a hash of their content: so the choice is the same for every order of
files and rows, and for every number of processes.

Shapes: R rows, N tokens of all rows one after another, C characters likewise, H bins of a signature (128), B bands (16)
of eight of them each.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Allocation = Literal["proportional", "sqrt", "equal"]
Within = Literal["highest", "strata"]

NGRAM = 8  # tokens; shorter ones repeat in any good text: Hindi takes 3 to 5 to a word, an answer quotes its source
SHINGLE = 5  # characters: one edit in a row of 120 then leaves nine tenths of its shingles alone
BINS, BANDS = 128, 16  # bands of 8 as FineWeb has them (Penedo et al. 2024), and two more
STRATA = 10
DENSITY, LETTERS, REPEATED = 0.5, 0.6, 0.65  # bounds of noise, measured on real rows: docs/selecting.md
_PLANES = 0x40000  # code points that hold letters; the last of them is none
_ROUNDS = 8  # rows of a bucket that others are compared with, at most
_PAIRS = 1 << 16  # compared at a time
_MIX = tuple(np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

RECORD = np.dtype(
    [
        ("ordinal", "i8"),  # its place in its shard, from 0, rows that cannot be used included
        ("group", "i4"),
        ("tokens", "i4"),
        ("bytes", "i4"),  # of all its columns, about
        ("text", "u8"),  # hash of the text, normalised; seeded
        ("row", "u8"),  # hash of all columns
        ("entropy", "f4"),  # or loss
        ("repetition", "f4"),  # share of its n-grams that repeat an earlier one
        ("density", "f4"),  # bytes of text to a token
        ("letters", "f4"),  # share of its characters that are letters
    ]
)
"""What is kept of a row between reading and choosing: 56 bytes, and a signature of 128."""


class Fate(IntEnum):
    """What became of a row."""

    CHOSEN = 0
    BEYOND_BUDGET = 1
    REPEAT = 2
    NEAR_REPEAT = 3
    GARBLED = 4


# ---------------------------------------------------------------------- scores


def unigram_entropy(ids_N: Array, lengths_R: Array) -> Array:
    """Entropy of the distribution of a row's tokens, in nats.

    H = -sum_t p_t log p_t = log n - (1/n) sum_t c_t log c_t over the distinct tokens t, which the row has c_t times
    among its n.

    Args:
        ids_N: [N] ids below 2^32.
        lengths_R: [R] tokens of each row, fewer than 2^31 rows.

    Returns:
        [R] float64, 0 for a row without tokens; at most the log of its length, so that long rows score higher.
    """
    return _entropy(ids_N.astype(np.uint64), lengths_R)


def bigram_entropy(ids_N: Array, lengths_R: Array) -> Array:
    """Entropy of the distribution of a row's pairs of adjacent tokens, in nats; shapes as in `unigram_entropy`."""
    hashes, counts_R = _ngram_hashes(ids_N, lengths_R, 2)
    return _entropy(hashes, counts_R)


def repetition(ids_N: Array, lengths_R: Array, n: int = NGRAM) -> Array:
    """Share of a row's n-grams of tokens that repeat an earlier one: 1 - distinct / all.

    It is seq-rep-n of Welleck et al. 2020, "Neural text generation with unlikelihood training", section 6.1.

    Returns:
        [R] float64 in [0, 1); 0 for a row of fewer than n tokens.
    """
    hashes, counts_R = _ngram_hashes(ids_N, lengths_R, n)
    rows, _ = _distinct(hashes, counts_R)
    distinct_R = np.bincount(rows, minlength=len(lengths_R))
    return 1.0 - np.divide(distinct_R, counts_R, out=np.ones(len(lengths_R)), where=counts_R > 0)


def letter_share(texts: Sequence[str]) -> Array:
    """[R] share of each text's characters, white space left out, that are letters of any script, or their marks."""
    chars_C = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    kinds_C = _kinds()[np.minimum(chars_C, _PLANES - 1)]
    rows_C = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    letters_R = np.bincount(rows_C, weights=kinds_C == 1, minlength=len(texts))
    return letters_R / np.maximum(np.bincount(rows_C, weights=kinds_C < 2, minlength=len(texts)), 1)


@functools.cache
def _kinds() -> Array:
    """Of each code point of the planes in use: 1 a letter or mark, 2 white space, 0 anything else."""
    kind = {"L": 1, "M": 1, "Z": 2}
    kinds = np.fromiter((kind.get(unicodedata.category(chr(point))[0], 0) for point in range(_PLANES)), np.uint8)
    kinds[[ord(c) for c in "\t\n\v\f\r"]] = 2
    return kinds


def _entropy(values: Array, counts_R: Array) -> Array:
    rows, times = _distinct(values, counts_R)
    weighted_R = np.bincount(rows, weights=times * np.log(times), minlength=len(counts_R))
    n_R = np.maximum(counts_R, 1)
    # Of one value many times over, rounding would leave a trace of either sign.
    return np.maximum(np.log(n_R) - weighted_R / n_R, 0.0).round(12)


def _distinct(values: Array, counts_R: Array) -> tuple[Array, Array]:
    """The distinct values of each row: the row of each, and how many times it has it."""
    rows = np.repeat(np.arange(len(counts_R)), counts_R)
    order = np.lexsort((values, rows))
    values, rows = values[order], rows[order]
    new = np.ones(len(values), bool)
    new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    starts = np.flatnonzero(new)
    return rows[starts], np.diff(starts, append=len(values))


def _ngram_hashes(ids_N: Array, lengths_R: Array, n: int) -> tuple[Array, Array]:
    """Hashes of the n-grams that lie within a row, row by row, and how many each row has."""
    counts_R = np.maximum(lengths_R - n + 1, 0)
    hashes = _windows(ids_N.astype(np.uint64), n)
    return hashes[_within_rows(lengths_R, counts_R)[: len(hashes)]], counts_R


def _within_rows(lengths_R: Array, counts_R: Array) -> Array:
    """[N] whether a window that begins here is one of the first `counts_R` of its row."""
    starts_R = np.cumsum(lengths_R) - lengths_R
    place_N = np.arange(int(lengths_R.sum())) - np.repeat(starts_R, lengths_R)
    inside: Array = place_N < np.repeat(counts_R, lengths_R)
    return inside


def _windows(values: Array, n: int) -> Array:
    """A hash of each n values that follow each other: a polynomial, mixed as in splitmix64."""
    size = max(len(values) - n + 1, 0)
    hashes = np.zeros(size, np.uint64)
    for i in range(n):
        hashes *= _MIX[0]
        hashes += values[i : i + size]
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        hashes ^= hashes >> np.uint64(shift)
        hashes *= factor
    return hashes ^ (hashes >> np.uint64(31))


# ---------------------------------------------------------------------- what is alike


def plain(text: str) -> str:
    """The text in Unicode's normal form C, every run of white space one space: equal here is an exact repeat."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def signatures(texts: Sequence[str]) -> Array:
    """What tells how alike rows are: MinHash of their runs of five characters, of which eight bits are kept.

    One-permutation hashing (Li, Owen & Zhang 2012): each shingle falls into one of 128 bins, whose least hash counts.
    An empty bin borrows from others in an order of its own (after Shrivastava 2017), so that a row has as many empty
    ones as any other: none. Eight bits of each are b-bit minwise hashing (Li & König 2010).

    Args:
        texts: As `plain` makes them; case is overlooked.

    Returns:
        [B, R] uint64, each of eight bytes that are equal for two rows as often as they share a shingle.
    """
    # Each row ends in zeros: as many shingles as characters, in the shortest row too.
    folded = [text.casefold() + "\0" * (SHINGLE - 1) for text in texts]
    lengths_R = np.array([len(text) for text in folded])
    chars_C = np.frombuffer("".join(folded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes = _windows(chars_C, SHINGLE)
    inside = _within_rows(lengths_R, lengths_R - SHINGLE + 1)[: len(hashes)]
    hashes, rows = hashes[inside], np.repeat(np.arange(len(texts)), lengths_R - SHINGLE + 1)
    least_RH = np.full(len(texts) * BINS, np.iinfo(np.uint64).max)
    np.minimum.at(least_RH, rows * BINS + (hashes >> np.uint64(57)).astype(np.int64), hashes)
    filled_RH = _fill_empty(least_RH.reshape(len(texts), BINS))
    return filled_RH.astype(np.uint8).view(np.uint64).T.copy()


_PROBES = np.stack([np.random.default_rng(bin).permutation(BINS) for bin in range(BINS)])


def _fill_empty(least_RH: Array) -> Array:
    empty = least_RH == np.iinfo(np.uint64).max
    rows, bins = np.nonzero(empty)
    filled = least_RH.copy()
    for probe in range(BINS):
        lender = _PROBES[bins, probe]
        found = ~empty[rows, lender]
        filled[rows[found], bins[found]] = least_RH[rows[found], lender[found]]
        rows, bins = rows[~found], bins[~found]
        if not len(rows):
            break
    return filled


def similarity(signatures_BR: Array, rows: Array, others: Array) -> Array:
    """Estimated Jaccard similarity of the shingles of pairs of rows; equal bytes, less those equal by chance."""
    equal = np.empty(len(rows))
    for start in range(0, len(rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        differs = signatures_BR[:, rows[part]] ^ signatures_BR[:, others[part]]
        equal[part] = (np.ascontiguousarray(differs).view(np.uint8).reshape(BANDS, -1, 8) == 0).mean((0, 2))
    return (equal - 1 / 256) / (1 - 1 / 256)


def near_repeats(signatures_BR: Array, ranked: Array, threshold: float) -> Array:
    """Rows that are much like a better one.

    Rows that share a band are compared with the best of them; those that are not like it, with the best of what is
    left, and so on. A row that has been dropped counts as no better one in later bands. What two rows at similarity s
    share is found with probability 1 - (1 - s^8)^16: 95% at 0.8, 99.99% at 0.9.

    Args:
        signatures_BR: [B, R] as `signatures` makes them.
        ranked: The rows that are left, the best one first.
        threshold: Least similarity.

    Returns:
        [R] bool.
    """
    dropped = np.zeros(signatures_BR.shape[1], bool)
    for band_R in signatures_BR:
        rows = ranked[~dropped[ranked]]
        rows = rows[np.argsort(band_R[rows], kind="stable")]  # equal keys together, the best one first
        for _ in range(_ROUNDS):
            keys = band_R[rows]
            same = np.zeros(len(rows), bool)
            same[1:] = keys[1:] == keys[:-1]
            members = np.flatnonzero(same)
            if not len(members):
                break
            best = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))[members]
            near = similarity(signatures_BR, rows[members], rows[best]) >= threshold
            dropped[rows[members[near]]] = True
            rows = rows[members[~near]]
    return dropped


# ---------------------------------------------------------------------- budget


def allocate(budget: int, weights: Array, capacities: Array) -> Array:
    """Shares a budget out over groups in proportion to their weights, by largest remainders.

    A group whose share is more than it holds gives back what it cannot use, and the others share that, until all is
    placed or every group is full. Equal remainders go to the group that stands first.

    Args:
        budget: Rows or tokens.
        weights: [groups], positive where the capacity is.
        capacities: [groups] how many rows or tokens each holds.

    Returns:
        [groups] int64, in all the budget or the capacities, whichever is less.
    """
    shares = np.zeros(len(weights), np.int64)
    open_ = capacities > 0
    left = min(int(budget), int(capacities.sum()))
    while left and open_.any():
        quotas = np.where(open_, left * weights / weights[open_].sum(), 0.0)
        full = open_ & (quotas >= capacities)
        if not full.any():
            shares[open_] = np.floor(quotas[open_]).astype(np.int64)
            remainders = np.where(open_, quotas - np.floor(quotas), -1.0).round(9)
            rest = left - int(shares[open_].sum())
            shares[np.argsort(-remainders, kind="stable")[:rest]] += 1
            break
        shares[full] = capacities[full]
        left -= int(capacities[full].sum())
        open_ &= ~full
    return shares


def fill(share: int, costs: Array) -> Array:
    """Which rows fit into a share, taken in their order; one too large is passed over for those after it.

    Args:
        share: Rows or tokens.
        costs: Of each row, at least 1.

    Returns:
        Their positions, in order.
    """
    taken: list[Array] = []
    candidates = np.arange(len(costs))
    while len(candidates := candidates[costs[candidates] <= share]):
        used = np.cumsum(costs[candidates])
        size = int(np.searchsorted(used, share, side="right"))
        taken.append(candidates[:size])
        share -= int(used[size - 1])
        candidates = candidates[size:]
    return np.concatenate(taken) if taken else candidates


# ---------------------------------------------------------------------- choice


@dataclass(frozen=True)
class Rule:
    """How rows are chosen.

    Args:
        budget: Rows or tokens; a share of them when `share` is set.
        share: The budget is this share of the rows or tokens that can be used, 0 to 1.
        unit: What the budget counts.
        allocation: A group weighs as many rows or tokens as it has, their square root, or 1.
        within: Inside a group, the highest scores first; or ten strata of equal size in score, each in proportion to
            its scores, rows drawn by hash.
        near: Similarity from which on two rows count as one; 1 leaves out exact repeats alone, 0 nothing.
        damp: Whether repetition takes from the score, and garbled rows are left out.
    """

    budget: int = 0
    share: float | None = None
    unit: Literal["rows", "tokens"] = "rows"
    allocation: Allocation = "proportional"
    within: Within = "highest"
    near: float = 0.8
    damp: bool = True


class Choice(NamedTuple):
    """What came of it.

    `order` are the chosen rows as they are written (by group, the highest score first), `shares` what each group was
    given of the budget, `left` what of it found no row.
    """

    scores: Array  # [R] float32, damped
    fates: Array  # [R] of Fate
    order: Array
    shares: Array  # [groups]
    budget: int
    left: int


def choose(records: Array, signatures_BR: Array, groups: Sequence[str], rule: Rule) -> Choice:
    """Chooses rows under a budget.

    Args:
        records: [R] of RECORD; `group` counts in `groups`.
        signatures_BR: [B, R]; not looked at where near repeats may stay.
        groups: Names, sorted.
        rule: How.
    """
    scores = records["entropy"].copy()
    fates = np.full(len(records), Fate.BEYOND_BUDGET, np.int8)
    if rule.damp:
        scores *= 1 - records["repetition"]
        fates[garbled(records, len(groups))] = Fate.GARBLED
    ranked = np.lexsort((records["row"], records["text"], -scores))
    if rule.near > 0:
        left = ranked[fates[ranked] == Fate.BEYOND_BUDGET]
        _, first = np.unique(records["text"][left], return_index=True)
        fates[np.delete(left, first)] = Fate.REPEAT
        if rule.near < 1:
            fates[near_repeats(signatures_BR, left[np.sort(first)], rule.near)] = Fate.NEAR_REPEAT
    budget = rule.budget
    costs = records["tokens"].astype(np.int64) if rule.unit == "tokens" else np.ones(len(records), np.int64)
    if rule.share is not None:
        budget = round(rule.share * int(costs.sum()))
    left = ranked[fates[ranked] == Fate.BEYOND_BUDGET]
    sizes = np.bincount(records["group"][left], weights=costs[left], minlength=len(groups))
    weights = {"proportional": sizes, "sqrt": np.sqrt(sizes), "equal": np.ones(len(groups))}[rule.allocation]
    shares = allocate(budget, weights, sizes.astype(np.int64))
    order = np.concatenate(
        [
            _taken(of_group, scores, records["text"], costs, share, rule.within)
            for of_group, share in zip(_by_group(left, records["group"], len(groups)), shares.tolist(), strict=True)
        ]
    )
    fates[order] = Fate.CHOSEN
    return Choice(scores, fates, order, shares, budget, budget - int(costs[order].sum()))


def garbled(records: Array, groups: int) -> Array:
    """[R] rows that are no text: few letters, mostly repeats, or tokens of far fewer bytes than usual in their group.

    Noise has as many tokens as it has letters, and so the highest entropy of all; markup and tables come next. (A low
    ratio of characters to tokens is what SantaCoder's data was filtered by, Ben Allal et al. 2023.)
    """
    found: Array = (records["letters"] < LETTERS) | (records["repetition"] > REPEATED)
    for of_group in _by_group(np.arange(len(records)), records["group"], groups):
        density = records["density"][of_group]
        found[of_group] |= density < DENSITY * np.median(density) if len(density) else False
    return found


def _by_group(rows: Array, group_R: Array, groups: int) -> Iterator[Array]:
    """The rows of each group, in the order given."""
    rows = rows[np.argsort(group_R[rows], kind="stable")]
    yield from np.split(rows, np.searchsorted(group_R[rows], np.arange(1, groups)))


def _taken(rows: Array, scores: Array, hashes: Array, costs: Array, share: int, within: Within) -> Array:
    """The rows of a group (the highest score first) that its share goes to, in that order."""
    if within == "highest":
        return rows[fill(share, costs[rows])]
    strata = np.array_split(rows, min(STRATA, max(len(rows), 1)))
    weights = np.array([float(scores[stratum].sum(dtype=np.float64)) for stratum in strata])
    held = np.array([int(costs[stratum].sum()) for stratum in strata])
    found = []
    for stratum, part in zip(strata, allocate(share, weights + 1e-9, held).tolist(), strict=True):
        drawn = stratum[np.argsort(hashes[stratum], kind="stable")]
        found.append(drawn[fill(part, costs[drawn])])
    chosen = np.zeros(len(hashes), bool)
    chosen[np.concatenate(found)] = True
    return rows[chosen[rows]]
