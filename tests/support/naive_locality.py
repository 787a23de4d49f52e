"""What `moetrace.analyze` computes of one layer, in plain Python; a row is a list of the experts it chose."""

from collections import Counter
from math import log


def gini(counts):
    """Mean absolute difference of all pairs, over twice the mean."""
    pairs = [abs(a - b) for a in counts for b in counts]
    return sum(pairs) / len(pairs) / (2 * sum(counts) / len(counts))


def zipf_likelihood(counts, exponent):
    ranked = sorted(counts, reverse=True)
    total = sum(rank**-exponent for rank in range(1, len(ranked) + 1))
    return sum(n * log(rank**-exponent / total) for rank, n in enumerate(ranked, start=1))


def overlap(requests, lag):
    """`requests`: lists of rows. Shared experts over those of the earlier row, where both rows chose any."""
    shared = chosen = 0
    for rows in requests:
        for earlier, later in zip(rows, rows[lag:], strict=False):
            if earlier and later:
                shared += len(set(earlier) & set(later))
                chosen += len(earlier)
    return shared / chosen if chosen else None


def lru_hit_rate(rows, capacity):
    """One access at a time; the last of the list was used last."""
    cache, hits, accesses = [], 0, 0
    for row in rows:
        for expert in row:
            accesses += 1
            if expert in cache:
                hits += 1
                cache.remove(expert)
            cache.append(expert)
            cache = cache[-capacity:]
    return hits / accesses


def reuse_distances(rows):
    rows = [row for row in rows if row]
    distances = []
    for now, row in enumerate(rows):
        for expert in row:
            before = [then for then in range(now) if expert in rows[then]]
            if before:
                distances.append(now - before[-1])
    return distances


def recall(pairs_to_train, pairs_to_test, k, experts):
    """Pairs of rows (source, target): least and most that naive Bayes may name, as near scores fall, and popularity."""
    prior, together = Counter(), Counter()
    for source, target in pairs_to_train:
        if source:
            prior.update(target)
            together.update((i, j) for i in source for j in target)
    column = {j: sum(together[i, j] for i in range(experts)) for j in range(experts)}
    least = most = popular = total = 0
    for source, target in pairs_to_test:
        if not source:
            continue
        scores = [
            log(prior[j] + 1) + sum(log((together[i, j] + 1) / (column[j] + experts)) for i in source)
            for j in range(experts)
        ]
        for j in target:
            least += sum(score > scores[j] - 1e-4 for score in scores) <= k  # itself is one of them
            most += sum(score > scores[j] + 1e-4 for score in scores) < k
            popular += in_top([prior[e] for e in range(experts)], j, k)
        total += len(target)
    return (least / total, most / total, popular / total) if total else None


def in_top(scores, j, k):
    """The chance to be among the k highest if lots decide between equal ones."""
    above = sum(score > scores[j] for score in scores)
    return min(1.0, max(0.0, (k - above) / scores.count(scores[j])))


def between_requests(requests, experts):
    requests = [[row for row in rows if row] for rows in requests]
    requests = [rows for rows in requests if rows]
    rows = sum(map(len, requests))
    by_chance = sum(1 / len(part) for part in requests) / len(requests)  # of one choice's variance, in that of a share
    above = below = 0.0
    for e in range(experts):
        shares = [sum(e in row for row in part) / len(part) for part in requests]
        mean = sum(shares) / len(shares)
        variance = sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
        p = sum(e in row for part in requests for row in part) / rows
        above += variance - by_chance * p * (1 - p)
        below += p * (1 - p) - by_chance * p * (1 - p)
    return above / below if below > 1e-12 else None


def sink(first_rows):
    first_rows = [set(row) for row in first_rows if row]
    pairs = [(a, b) for i, a in enumerate(first_rows) for j, b in enumerate(first_rows) if i != j]
    # Every ordered pair counts by the experts of its first row.
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs) if len(first_rows) > 1 else None


def coactivation(rows, experts):
    """Lift of each pair that independence expects once or more, and chi-squared over the pairs."""
    lifts, terms = [], []
    who = [{t for t, row in enumerate(rows) if e in row} for e in range(experts)]
    for i in range(experts):
        for j in range(i + 1, experts):
            both, expected = len(who[i] & who[j]), len(who[i]) * len(who[j]) / len(rows)
            if expected >= 1:
                lifts.append(both / expected)
                terms.append((both - expected) ** 2 / expected)
    return lifts, sum(terms) / len(terms) if terms else None
