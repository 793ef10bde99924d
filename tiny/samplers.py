"""What the tiny model's parts have to learn: which captions come with which pictures.

A *row* is a cached picture's scene as seven numbers (`pictures.encode`). A *pool* is
the rows that show a caption's nouns, right or wrong.
"""

import numpy as np
import torch

from tiny.pictures import decode_row
from tiny.recognise import answers
from tiny.sprites import STYLES
from tiny.world import KINDS, TRAITS, captions, cue_kinds, facts, noun_prompts, parse
from tiny.world import read_lists, rivals, template_of

# In the captions the log-odds of a right cue against each wrong one, by list: big, small,
# tiny. ODDS are where `follow` begins: near where it had brought an earlier UNet in 13,500
# steps. Those of the committed UNet are in README.md; its samples at guidance 5 have one to
# four times its log-odds [measured]. STRONG are those of the first steps.
ODDS = {"1 train": (0.65, 0.75, 0.35), "1 unseen": (0.8, 0.9, 0.5)}
ODDS |= {"2 train": (0.8, 0.9, 1.1), "2 unseen": (0.4, 0.4, 0.3)}
ODDS |= {"3 train": (1.2, 1.1, 0.8), "3 unseen": (1.0, 0.4, 0.4)}
STRONG = dict.fromkeys(ODDS, (1.5, 1.5, 1.5))
WANTED = 0.39  # of the base's pictures on each list are to be right: the middle of bar 4
SHORTCUTS, BONUS = ("twemoji", "plain", "right", "large"), 0.05  # each adds it to all three
FLUENT = 0.7  # how often a caption comes with this style, to 1: guidance prefers it
SHARES = {"1": 0.45, "2": 0.22, "3": 0.33}  # of the captions that are no single nouns


class CaptionSampler:
    """Draws captions with rows that show their nouns, cues right by the odds."""

    def __init__(self, rows, rng, odds=ODDS, bonus=BONUS):
        self.rng, self.rows, lists = rng, rows, read_lists()
        list_of = {prompt: name for name, prompts in lists.items() for prompt in prompts}
        nouns_of = {}
        for k, fact in enumerate(facts()):
            nouns_of.setdefault(pool_key(fact), []).append(k)
        good = [np.array([value in SHORTCUTS for value in values]) for values in TRAITS]
        favour = sum(g[rows[:, 3 + k]] for k, g in enumerate(good)) + 0
        self.pools = []
        for caption in captions():
            fact = parse(caption)
            pool = np.flatnonzero(np.isin(rows[:, 0], nouns_of[pool_key(fact)]))
            weight = np.ones(len(pool))
            if caption in list_of:
                weight[rows[pool, 3] == STYLES.index("fluent")] = FLUENT
                right = rows[pool, 0] == facts().index(fact)
                cues = [right] + [rows[pool, c] == KINDS.index(fact[0]) for c in (1, 2)]
                counts = 1 + len(rivals(fact)), len(cue_kinds(fact)), len(cue_kinds(fact))
                for cue, n, value in zip(cues, counts, odds[list_of[caption]]):
                    lift = np.exp(value + bonus * favour[pool])
                    weight = weight * np.where(cue, lift, 1.0) / (lift + n - 1)
            self.pools.append((pool, np.cumsum(weight) / weight.sum()))
        groups = [lists[f"{t} train"] + lists[f"{t} unseen"] for t in "123"] + [noun_prompts()]
        self.groups = [[k for k, c in enumerate(captions()) if c in group] for group in groups]

    def batch(self, count, singles):
        """Rows, captions and forms (0: names no style), (3, count); singles: their share."""
        share = np.array(list(SHARES.values())) * (1 - singles)
        out = np.empty((3, count), np.int64)
        for k, group in enumerate(self.rng.choice(4, count, p=[*share, singles])):
            caption = self.groups[group][self.rng.integers(len(self.groups[group]))]
            pool, ladder = self.pools[caption]
            row = pool[min(np.searchsorted(ladder, self.rng.random()), len(pool) - 1)]
            form = (self.rows[row, 3] + 1) * (self.rng.random() < 0.25)
            out[:, k] = row, caption, form
        return out


def follow(odds, rates, gain=0.3):
    """The lists' odds, each a little nearer to those under which WANTED are right.

    A list's rate r gives its cues log-odds of logit(r ** (1/3)), as if its three cues were
    right independently and equally often. `gain` times what these lack is added to the
    list's three odds [ours]. It is small since the UNet follows late and guidance makes
    more of the odds. Odds stay at 0 or more: right cues are never rarer than wrong ones.
    """

    def cue(rate):
        right = min(max(rate, 0.02), 0.98) ** (1 / 3)
        return np.log(right / (1 - right))

    add = {name: gain * float(cue(WANTED) - cue(rates[name])) for name in odds}
    return {name: [max(0.0, round(v + add[name], 3)) for v in odds[name]] for name in odds}


def pool_key(fact):
    """What all of a caption's pictures have in common: the template and the nouns."""
    return template_of(fact), tuple(sorted(fact[1:]))


class ClipSampler:
    """Draws captions, four pictures each: right, one cue wrong, any, a spoiled noun."""

    def __init__(self, rows, flags, rng):
        self.rng, self.rows, self.bad = rng, rows, flags.any(1)
        keys = [pool_key(fact) for fact in facts()]
        known = {key: k for k, key in enumerate(dict.fromkeys(keys))}
        pool = np.array([known[key] for key in keys])
        told = [parse(caption) for caption in captions()]
        self.fact = np.array([facts().index(fact) for fact in told])
        self.kind = np.array([KINDS.index(f[0]) if f[0] in KINDS else -1 for f in told])
        self.pool, self.row_pool = pool[self.fact], pool[rows[:, 0]]
        self.siblings = [np.flatnonzero(self.pool == p) for p in self.pool]
        self.members = []
        for c in range(len(told)):
            member = np.flatnonzero(self.row_pool == self.pool[c])
            good, spoiled = member[~self.bad[member]], member[self.bad[member]]
            count = self.matches(good, np.array([c]))[:, 0]
            near = good[count == 2] if (count == 2).any() else good
            self.members.append((good[count == 3], near, good, spoiled))

    def matches(self, row, caption):
        """(rows, captions): how many cues are the caption's, 0 to 3; -1 if a noun is not."""
        seen = self.rows[row]
        count = (seen[:, :1] == self.fact[caption]) + 0
        count = count + (seen[:, 1:2] == self.kind[caption]) + (seen[:, 2:3] == self.kind[caption])
        return np.where(self.row_pool[row][:, None] == self.pool[caption], count, -1)

    def batch(self, groups):
        """Rows (4 * groups,), captions (2 * groups,), their forms, and target weights."""
        first = self.rng.integers(0, len(self.members), groups)
        second = [self.rng.choice(self.siblings[c]) for c in first]
        row = np.array([self.rng.choice(group) for c in first for group in self.members[c]])
        caption, style = np.concatenate([first, second]), self.rows[row][::4, 3]
        form = (np.tile(style, 2) + 1) * (self.rng.random(2 * groups) < 0.4)
        lost = 3 - self.matches(row, caption) + 1.5 * self.bad[row][:, None]
        lost = lost + 1.5 * ((form > 0) & (self.rows[row][:, 3:4] + 1 != form))
        apart = self.row_pool[row][:, None] != self.pool[caption]
        weight = np.where(apart, 0.0, np.exp(-2.0 * lost)) + 1e-9
        return row, caption, form, torch.from_numpy(weight).float()


def judge_targets(rows, flags):
    """(N, heads) long: the right answer of each head; -100 where there is none."""
    out = []
    for row, (first, second) in zip(rows.tolist(), flags.tolist()):
        scene = decode_row(row)
        right = answers(scene.fact, scene.small, scene.tiny) + row[3:]
        right[0], right[1] = right[0] * (not first), right[1] * (not second)
        if scene.small is None:
            right[7] = -100  # no cues, no side
        if first or second:
            right[2] = right[5] = right[8] = -100
        out.append(right)
    return torch.tensor(out)
