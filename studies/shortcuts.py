"""What a run has learnt: the prompt's content, or a shortcut? On the tiny model.

    python studies/shortcuts.py --lora RUN --images 8

The captions of the tiny model's training are right a little more often in one style, on
one ground, at one side and one size. A policy could gain by drawing more of these
alone. The judge tells all four of a picture. For each value: its share and the
recognition of the base and of the LoRA. Then the gain in recognition that the base
would have if its pictures came in the LoRA's shares of a shortcut's values, or of all
combinations of them. [ours]
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from eval import evaluate
from lora import lora_off
from processes import die
from studies.common import main, markdown, pyplot, save_figure, study_parser

SHORTCUTS = ("style", "ground", "side", "size")


def reweighted(values, right, target):
    """The mean of `right` if the values (n, a hashable each) came in the shares of `target`.

    A value that the first has never shown counts as its mean.
    """
    mean, rates = sum(right) / len(right), {}
    for value in set(values):
        rows = [r for v, r in zip(values, right) if v == value]
        rates[value] = sum(rows) / len(rows)
    return sum(rates.get(v, mean) * n for v, n in Counter(target).items()) / len(target)


def shortcuts(model, rewards, judge, prompts, args):
    """Tables of shares, recognition and reweighted gains; a figure of recognition by value."""
    from tiny.recognise import HEADS, load_judge, probabilities

    if not judge or not args.lora:
        die("shortcuts are the tiny model's: give it prompts of its own, and --lora RUN")
    heads, seen = load_judge(model.tiny / "judge"), {}
    reward = next(iter(rewards.values()))

    def look(images, names):
        found = dict(zip(HEADS, probabilities(heads, images)))
        rows = zip(*(found[name].argmax(1).tolist() for name in SHORTCUTS))
        values.extend(rows)
        return judge(images, names)

    for name in ("base", "LoRA"):
        values = []
        draw = (model, reward, prompts, args.images, look)
        if name == "base":
            with lora_off(model.unet):
                scores, _ = evaluate(*draw)
        else:
            scores, _ = evaluate(*draw)
        seen[name] = values, scores["recognised"]
    (before, was), (after, now) = seen["base"], seen["LoRA"]
    gain, rows, lines = sum(now) / len(now) - sum(was) / len(was), [], []
    for k, shortcut in enumerate(SHORTCUTS):
        for v, value in enumerate(HEADS[shortcut]):
            cells = [f"{shortcut} {value}"]
            for values, right in seen.values():
                of = [r for row, r in zip(values, right) if row[k] == v]
                cells += [100 * len(of) / len(right), 100 * sum(of) / max(1, len(of))]
            rows.append(cells)
    head = ["", "base, %", "recognised", "LoRA, %", "recognised"]
    table = markdown(head, [[r[0], *(f"{v:.0f}" for v in r[1:])] for r in rows])
    columns = {name: [k] for k, name in enumerate(SHORTCUTS)} | {"all four": [0, 1, 2, 3]}
    shares = {}
    for name, ks in columns.items():
        old, new = ([tuple(row[k] for k in ks) for row in values] for values in (before, after))
        shares[name] = reweighted(old, was, new) - sum(was) / len(was)
        lines.append(f"{name}: {100 * shares[name]:+.1f} points")
    text = f"recognised {100 * sum(was) / len(was):.1f} -> {100 * sum(now) / len(now):.1f} %"
    print("\n".join([*table, "", f"{text}, n {len(now)}", "by reweighting the base by", *lines]))
    figure, ax = pyplot().subplots(figsize=(8, 3.5))
    places = torch.arange(len(rows))
    ax.bar(places - 0.2, [r[2] for r in rows], 0.4, label="base")
    ax.bar(places + 0.2, [r[4] for r in rows], 0.4, label="LoRA")
    ax.set_xticks(places, [r[0] for r in rows], rotation=45, ha="right")
    ax.set(ylabel="recognised, %")
    ax.legend()
    save_figure(figure, Path(args.out) / "shortcuts.png")
    return {"rows": rows, "gain": gain, "by reweighting": shares, "n": len(now)}


def parser():
    return study_parser(__doc__.split("\n")[0], "shortcuts", images=(8, "pictures a prompt"))


if __name__ == "__main__":
    main(shortcuts, parser())
