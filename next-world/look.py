"""Sheets of drawings: python look.py out.png"""
import sys; sys.path.insert(0, "./repo")
import numpy as np
from PIL import Image
from tiny import world as w
rng = np.random.default_rng(4)
rows = []
def sc(p, style, small=None, tiny=None, ground=None, side="right", size="large"):
    f = w.parse(p); k = f[0]
    return w.draw_scene(w.Scene(f, small or k, tiny or k, style, ground or str(rng.choice(w.GROUNDS)), side, size), rng)
P = [["a cat washing dishes","a fox riding a bike","a duck playing chess","a deer washing dishes","a shark riding a bike","a zebra playing chess"],
     ["red apple","green apple","yellow banana","white strawberry","purple grape","brown avocado"],
     ["dog on boat","person on the left of ball","motorcycle behind person","car on street","glasses on face","table under vase"]]
for group in P:
    for s in w.STYLES:
        rows.append(np.concatenate([sc(p, s, side=w.SIDES[k % 2], size=w.SIZES[k // 3 % 2]) for k, p in enumerate(group)], 1))
im = Image.fromarray(np.concatenate(rows)); im.resize((im.width * 2, im.height * 2), 0).save(sys.argv[1])
