"""What the networks have to learn: which captions come with which pictures.

`rows` (N, 7) are pictures' scenes (`scenes.encode`). A *pool* is all pictures that show a
caption's nouns, right or wrong. A *form* is 0 for a bare caption, else 1 + the style that
it names.
"""

import numpy as np
import torch

from tiny.build import scenes
from tiny.build.scenes import CAPTIONS, FACTS, LISTS, TEMPLATE, TOLD, TRAITS
from tiny.judge import fact_answers
from tiny.world import KINDS, STYLES

# In the captions the log-odds of a right cue against each wrong one, by list: big, small,
# tiny. ODDS are where `follow` begins: near where it had brought an earlier UNet in 13,500
# steps. Those of the committed UNet are in README.md; its samples at guidance 5 have one to
# four times its log-odds [measured]. STRONG are those of the first steps.
ODDS = {
    "1 train": (0.65, 0.75, 0.35), "1 unseen": (0.8, 0.9, 0.5),
    "2 train": (0.8, 0.9, 1.1), "2 unseen": (0.4, 0.4, 0.3),
    "3 train": (1.2, 1.1, 0.8), "3 unseen": (1.0, 0.4, 0.4),
}  # fmt: skip
STRONG = dict.fromkeys(ODDS, (1.5, 1.5, 1.5))
WANTED = 0.39  # of the base's pictures on each list are to be right: the middle of bar 4
SHORTCUTS = ("twemoji", "plain", "right", "large")
BONUS = 0.05  # each shortcut adds it to the log-odds of all three cues
FLUENT = 0.7  # how often a caption comes with this style, to 1: guidance prefers it
SHARES = (0.45, 0.22, 0.33)  # of the templates in the captions that are no single nouns

POOL_KEYS = [(TEMPLATE[fact[0]], *sorted(fact[1:])) for fact in FACTS]
POOL = np.array([POOL_KEYS.index(key) for key in POOL_KEYS])  # of each of the FACTS
# (captions, 3): the first three entries of a row whose cues are all the caption's
CUES = np.array([[FACTS.index(fact), *[("alone", *KINDS).index(fact[0])] * 2] for fact in TOLD])
FACT_ANSWERS = torch.tensor([fact_answers(fact)[:3] for fact in FACTS])


class CaptionSampler:
    """Draws captions with rows that show their nouns, cues right by the odds."""

    def __init__(self, rows, rng, odds=ODDS, bonus=BONUS):
        self.rows = rows
        self.rng = rng
        list_of = {prompt: name for name, prompts in LISTS.items() for prompt in prompts}
        # How many shortcuts a picture takes
        favour = sum(np.isin(v, SHORTCUTS)[rows[:, 3 + k]] + 0 for k, v in enumerate(TRAITS))
        self.pools = []  # of each caption: its pool, and the cumulated weights
        for caption, fact, cues in zip(CAPTIONS, TOLD, CUES):
            pool = np.flatnonzero(POOL[rows[:, 0]] == POOL[cues[0]])
            weight = np.ones(len(pool))
            if caption in list_of:
                weight[rows[pool, 3] == STYLES.index("fluent")] = FLUENT
                right = rows[pool, :3] == cues
                kinds = len(scenes.cue_kinds(fact))
                choices = (1 + len(scenes.rivals(fact)), kinds, kinds)
                for k, log_odds in enumerate(odds[list_of[caption]]):
                    lift = np.exp(log_odds + bonus * favour[pool])
                    weight = weight * np.where(right[:, k], lift, 1.0) / (lift + choices[k] - 1)
            self.pools.append((pool, np.cumsum(weight) / weight.sum()))
        templates = np.array([TEMPLATE[fact[0]] for fact in TOLD])
        self.groups = [np.flatnonzero(templates == t) for t in ("1", "2", "3", None)]

    def batch(self, count, singles):
        """Rows, captions and forms, (3, count); singles: the share of single nouns."""
        share = np.array(SHARES) * (1 - singles)
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

    def log_odds(rate):
        return torch.tensor(rate).double().clamp(0.02, 0.98).pow(1 / 3).logit().item()

    moved = {}
    for name, values in odds.items():
        add = gain * (log_odds(WANTED) - log_odds(rates[name]))
        moved[name] = [max(0.0, round(value + add, 3)) for value in values]
    return moved


class ClipSampler:
    """Draws captions, four pictures each: right, one cue wrong, any, a spoiled noun."""

    def __init__(self, rows, flags, rng):
        self.rows = rows
        self.rng = rng
        self.bad = flags.any(1)
        pool_of = POOL[CUES[:, 0]]
        self.siblings = [np.flatnonzero(pool_of == pool) for pool in pool_of]
        self.members = []
        for caption, pool in enumerate(pool_of):
            member = np.flatnonzero(POOL[rows[:, 0]] == pool)
            good, spoiled = member[~self.bad[member]], member[self.bad[member]]
            count = self.matches(good, np.array([caption]))[:, 0]
            near = good[count == 2] if (count == 2).any() else good
            self.members.append((good[count == 3], near, good, spoiled))

    def matches(self, row, caption):
        """(rows, captions): how many cues are the caption's, 0 to 3; -1 if a noun is not."""
        cues = self.rows[row][:, None, :3]
        count = (cues == CUES[caption]).sum(-1)
        return np.where(POOL[cues[..., 0]] == POOL[CUES[caption, 0]], count, -1)

    def batch(self, groups):
        """Rows (4 * groups,), captions (2 * groups,), their forms, and target weights."""
        first = self.rng.integers(0, len(self.members), groups)
        second = [self.rng.choice(self.siblings[c]) for c in first]
        row = np.array([self.rng.choice(group) for c in first for group in self.members[c]])
        caption = np.concatenate([first, second])
        style = self.rows[row][:, 3:4] + 1
        form = np.tile(style[::4, 0], 2) * (self.rng.random(2 * groups) < 0.4)
        count = self.matches(row, caption)
        lost = 3 - count + 1.5 * self.bad[row][:, None] + 1.5 * ((form > 0) & (style != form))
        weight = np.where(count < 0, 0.0, np.exp(-2.0 * lost)) + 1e-9
        return row, caption, form, torch.from_numpy(weight).float()


def judge_targets(rows, flags):
    """(N, heads) long: the right answer of each of HEADS; -100 where there is none."""
    rows = rows.long()
    targets = torch.cat([FACT_ANSWERS[rows[:, 0]], rows[:, 1:]], 1)
    targets[:, :2][flags] = 0  # a spoiled noun is no noun, and hides what else it tells
    targets[:, [2, 5, 8]] = targets[:, [2, 5, 8]].where(~flags.any(1, keepdim=True), -100)
    targets[rows[:, 1] == 0, 7] = -100  # no cues, no side
    return targets
